"""The index of where each request stands: small objects whose keys say all, so that a claim reads what waits only.

A request whose last event is n has the entry `index/<status>/<line>/<received>.<n>.<id>`, at every moment: whoever
moves it puts the next entry first, then the event, and takes the old entry away last. So an entry of an earlier event
is stale, and one of an event that does not exist is in flight, or was left behind by a crash. A request that was
received and no more has the entry of its first event, which its submission put before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.requests.schema import DeletionRequest, RequestState, Status
from salun_core.storage.names import index_key, index_prefix
from salun_core.storage.objects import ObjectStore

LEFT_BEHIND = timedelta(hours=24)
"""Age from which an entry in flight counts as left by a crash."""


@dataclass(frozen=True)
class IndexEntry:
    """That a request stands at a status since its n-th event.

    Args:
        request: its id.
        line: its model line.
        status: where it stands.
        received: when it was received, in whole seconds since 1970.
        n: number of the event that put it there.
        modified: the server's time when the entry was put (UTC); None where it was not listed.
    """

    request: str
    line: str
    status: Status
    received: int
    n: int
    modified: datetime | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Its key in the store."""
        return index_key(self.status, self.line, self.received, self.n, self.request)


def entry_of(request: DeletionRequest, status: Status, number: int) -> IndexEntry:
    """Return the entry of a request that stands at a status since its n-th event."""
    return IndexEntry(request.id, request.model_line, status, int(request.received.timestamp()), number)


def entry_now(state: RequestState) -> IndexEntry:
    """Return the entry that a request must have now."""
    if state.last is None:
        return entry_of(state.request, Status.QUEUED, 1)
    return entry_of(state.request, state.last.to_status, state.last.n)


def put(store: ObjectStore, entry: IndexEntry, writer: str) -> bool:
    """Put an entry, and return whether it was not there before.

    Args:
        store: where to.
        entry: the entry.
        writer: random token of the call, by which two calls are told apart.
    """
    try:
        store.put_new(entry.key, writer.encode())
    except ConflictError:
        return False
    return True


def drop(store: ObjectStore, entry: IndexEntry) -> None:
    """Take an entry away; it is no error where there is none."""
    store.delete(entry.key)


def entries(store: ObjectStore, status: Status, line: str | None = None) -> Sequence[IndexEntry]:
    """Return the entries of a status by one listing, the oldest request first; some may be stale or in flight.

    Args:
        store: where they are kept.
        status: the status.
        line: only those of this model line.

    Raises:
        IntegrityError: something there is no entry.
    """
    found = []
    for row in store.list(index_prefix(status, line or "")):
        entry = parse_key(row.key)
        if entry is None:
            raise IntegrityError(
                f"{row.key} is no index entry", "something else wrote it", "use `salun request reindex`"
            )
        found.append(replace(entry, modified=row.modified))
    return sorted(found, key=lambda entry: (entry.received, entry.request, entry.n))


def parse_key(key: str) -> IndexEntry | None:
    """Return the entry that a key is, or None where it is none."""
    parts = key.split("/")
    numbers = parts[-1].split(".", 2)
    if len(parts) != 4 or len(numbers) != 3 or parts[1] not in set(Status):
        return None
    received, number, request = numbers
    if not (received.isdecimal() and number.isdecimal()):
        return None
    entry = IndexEntry(request, parts[2], Status(parts[1]), int(received), int(number))
    try:
        return entry if entry.key == key else None
    except UsageError:  # no valid id
        return None


def is_stale(entry: IndexEntry, state: RequestState) -> bool:
    """Return whether an entry can never be right again, so that anybody may delete it.

    Args:
        entry: an entry of the request.
        state: the request as it was read after the entry.
    """
    now, last = entry_now(state), state.last.n if state.last else 0
    if (entry.line, entry.received) != (now.line, now.received):
        return True
    return entry.n < last or (entry.n == last and entry.status is not state.status)


def is_left_behind(entry: IndexEntry, state: RequestState | None, now: datetime | None) -> bool:
    """Return whether an entry announces a move that a crash cut off long ago.

    Args:
        entry: an entry that is not stale.
        state: the request, or None where there is none.
        now: the store's time, at least.
    """
    if entry.modified is None or now is None or now - entry.modified <= LEFT_BEHIND:
        return False
    return state is None or entry != entry_now(state)


def store_time(found: Iterable[IndexEntry]) -> datetime | None:
    """Return the latest time of a listing: the store's clock was there or later."""
    return max((entry.modified for entry in found if entry.modified is not None), default=None)
