"""Looks at what waits: which requests go together, and whether their batch is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from salun_core.requests.batching import why_due
from salun_core.requests.books import Books
from salun_core.requests.deadlines import as_utc
from salun_core.requests.index import IndexEntry
from salun_core.requests.schema import RequestState, Status
from salun_core.requests.standing import read_entries
from salun_core.requests.terms import Terms

_LOOKED_AT = 4  # times the size of a batch


@dataclass(frozen=True)
class Found:
    """Requests that may be claimed together, the oldest first, and why now."""

    states: Sequence[RequestState]
    reason: str
    recovered: Sequence[str] = ()


def first_due(books: Books, line: str, run: str, terms: Terms) -> Found:
    """Find the requests that go together with the oldest one that waits."""
    ours = [
        state for state in books.ledger.open_states(line, [Status.IN_PROGRESS]) if state.last and state.last.run == run
    ]
    if ours:  # an earlier attempt of this very step took them, and was killed before it could record them
        return Found(ours, "claimed before")
    waiting = books.ledger.standing(Status.QUEUED, line)
    reason = _why(waiting, books, terms)
    if reason is None:
        return Found([], f"{len(waiting)} waiting, and no batch is due" if waiting else "no request waits")
    states = _together(books, waiting, terms.max_requests)
    return Found(states, reason) if states else Found([], "no request waits")


def _together(books: Books, waiting: Sequence[IndexEntry], size: int) -> list[RequestState]:
    """Read the requests that go with the oldest one, the oldest first, and no more of them than a batch takes."""
    found: list[RequestState] = []
    for start in range(0, _LOOKED_AT * size, size):
        states = read_entries(books.store, waiting[start : start + size])
        found += [state for state in states if state.status is Status.QUEUED]
        first = min(found, key=lambda state: (state.request.due, state.request.id), default=None)
        together = [state for state in found if first and kind_of(state) == kind_of(first)]
        if len(together) >= size or start + size >= len(waiting):
            break
    return together


def kind_of(state: RequestState) -> tuple[str | None, int]:
    """What requests of one batch share: the half of a refused batch, and the recipe that comes next."""
    return (state.last.group, state.last.rung) if state.last else (None, 0)


def _why(waiting: Sequence[IndexEntry], books: Books, terms: Terms) -> str | None:
    received = [datetime.fromtimestamp(entry.received, UTC) for entry in waiting]
    returned = sum(entry.n > 1 for entry in waiting)
    return why_due(received, returned, as_utc(books.clock()), terms)


def preview(books: Books, line: str, terms: Terms) -> tuple[int, str | None]:
    """Say what a sweep would do, and write nothing: how many requests wait, and why a batch is due, if one is."""
    waiting = books.ledger.standing(Status.QUEUED, line)
    return len(waiting), _why(waiting, books, terms)
