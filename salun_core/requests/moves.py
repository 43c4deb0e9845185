"""Builds the event that moves a request from where it stands, and refuses the ways that there are not."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime

from salun_core.config import parse
from salun_core.digest import sha256_bytes
from salun_core.errors import ConflictError
from salun_core.requests.deadlines import as_utc
from salun_core.requests.schema import (
    TRANSITIONS,
    Outcome,
    RequestEvent,
    Status,
    next_attempt,
    next_rung,
    status_after,
    transition_allowed,
)


@dataclass(frozen=True)
class Move:
    """Where a request goes, and why.

    Args:
        to: the status to move to.
        actor: who moves it.
        reason: why, without personal data.
        run: the unlearning run that moves it.
        outcome: how it was met; with `completed` only.
        epoch: of the model line's lease under which a run moves it.
        rung: the recipe of the ladder that comes next; None keeps that of the event before.
        group: the half of a refused batch that it belongs to.
    """

    to: Status
    actor: str
    reason: str
    run: str | None = None
    outcome: Outcome | None = None
    epoch: int | None = None
    rung: int | None = None
    group: str | None = None


def event_after(request_id: str, last: RequestEvent | None, move: Move, now: datetime) -> RequestEvent:
    """Return the event that a move writes.

    Args:
        request_id: the request.
        last: its last event; None where it was received and no more.
        move: where it goes.
        now: the time.

    Raises:
        ConflictError: it may not go there from where it stands.
        UsageError: an argument is not valid.
    """
    source = status_after(last)
    if not transition_allowed(source, move.to):
        ways = ", ".join(sorted(TRANSITIONS[source])) or "nowhere"
        raise ConflictError(
            f"request {request_id} cannot go from {source} to {move.to}",
            f"from {source} it may go to {ways}",
            f"look at it with `salun request show {request_id}`",
        )
    fields = {
        "request": request_id,
        "n": last.n + 1 if last else 1,
        "at": as_utc(now).isoformat(),
        "actor": move.actor,
        "from_status": source,
        "to_status": move.to,
        "reason": move.reason,
        "attempt": next_attempt(last, move.to),
        "run": move.run,
        "outcome": move.outcome,
        "previous": sha256_bytes(last.canonical()) if last else None,
        "epoch": move.epoch,
        "rung": next_rung(last, move.rung),
        "group": move.group,
        "writer": secrets.token_hex(16),
    }
    return parse(RequestEvent, fields, f"a move of request {request_id}")
