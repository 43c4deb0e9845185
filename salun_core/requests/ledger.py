"""The ledger of deletion requests: every request and event is a document that is created once and never changed."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from salun_core.config import parse
from salun_core.data.forget_set import Target
from salun_core.digest import sha256_bytes
from salun_core.errors import ConflictError, StoreError, UsageError
from salun_core.requests import index, reading
from salun_core.requests import index as standing
from salun_core.requests.index import IndexEntry
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import (
    TRANSITIONS,
    DeletionRequest,
    Outcome,
    Receipt,
    RequestEvent,
    RequestState,
    Status,
    next_attempt,
    next_rung,
    status_after,
    transition_allowed,
)
from salun_core.storage.keys import event_key, request_key
from salun_core.storage.objects import ObjectStore
from salun_core.times import Clock, as_utc, due_after_one_month


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


_SLOW_SECONDS = 3600.0


@dataclass(frozen=True)
class Announced:
    """An index entry that was put before its event.

    Args:
        entry: the entry.
        new: whether it was not there before.
        at: when, on this machine's monotonic clock.
    """

    entry: IndexEntry
    new: bool
    at: float


class Journal:
    """Writes requests, events and index entries.

    Args:
        store: where to.
        dry_run: check everything and write nothing.
    """

    def __init__(self, store: ObjectStore, dry_run: bool = False) -> None:
        self._store, self._dry_run = store, dry_run

    def announce(self, request: DeletionRequest, event: RequestEvent) -> Announced:
        """Put the index entry of an event that is about to be written."""
        entry = index.entry_of(request, event.to_status, event.n)
        new = self._dry_run or index.put(self._store, entry, event.writer)
        return Announced(entry, new, time.monotonic())

    def log(self, event: RequestEvent, announced: Announced) -> None:
        """Write an event whose entry was announced; an entry in vain is taken back.

        An entry that lay there from long ago, or has waited for long, may be deleted as left behind just before its
        event is written, and is put again.

        Raises:
            ConflictError: somebody else has written an event of that number.
        """
        try:
            self.create(event_key(event.request, event.n), event.canonical())
        except ConflictError:
            self.drop_stale(announced.entry, reading.read_state(self._store, event.request))
            raise
        sure = announced.new and time.monotonic() - announced.at < _SLOW_SECONDS
        if not sure and not self._dry_run:
            index.put(self._store, announced.entry, event.writer)

    def drop_stale(self, entry: IndexEntry, state: RequestState) -> None:
        """Delete an entry if it is stale; where that fails, whoever reads it may do it."""
        if not self._dry_run and index.is_stale(entry, state):
            with contextlib.suppress(StoreError):
                index.drop(self._store, entry)

    def redact(self, request_id: str) -> None:
        """Redact a request that nobody will erase any more; raises as `redact_request`."""
        if not self._dry_run:
            redact_request(self._store, request_id, keep_hashes=False)

    def create(self, key: str, data: bytes) -> None:
        """Create a document.

        Raises:
            ConflictError: there is one already, and it holds other bytes.
        """
        if not self._dry_run:
            self._store.put_new(key, data)
            return
        stored = self._store.get(key)
        if stored is not None and stored.data != data:
            raise ConflictError(f"{key} exists already", "it holds other content", "read it")


_CLOCKS_APART = timedelta(minutes=5)
# Ways that only their own method takes, so that no general move takes them by accident.
_DELIBERATE = {(Status.COMPLETED, Status.QUEUED): "reopen", (Status.FAILED, Status.QUEUED): "retry"}
# Nobody will erase these any more; of a completed request its run knows what must be found again.
_REDACTED_AT_ONCE = {Status.CANCELLED, Status.REJECTED}


class Ledger:
    """Files, reads and moves deletion requests.

    Args:
        store: where they are kept.
        clock: gives the time now.
        dry_run: check everything and write nothing; what would be written is returned all the same.
    """

    def __init__(self, store: ObjectStore, clock: Clock, dry_run: bool = False) -> None:
        self._store, self._clock, self._dry_run = store, clock, dry_run
        self._journal = Journal(store, dry_run)

    def submit(
        self,
        request_id: str,
        model_line: str,
        target: Target,
        received_at: datetime | None = None,
        source: str | None = None,
        actor: str = "submit",
    ) -> Receipt:
        """File a request and queue it; filing the same again gives the same receipt.

        It also completes a call that was cut off between the request and its first event.

        Args:
            request_id: its id.
            model_line: the model line to erase from.
            target: what is to be forgotten.
            received_at: when the person asked; now unless given.
            source: where it came from, without personal data.
            actor: who files it.

        Raises:
            UsageError: an id is not valid, or the time lies in the future.
            ConflictError: a request of that id says something else.
        """
        request = self._draft(request_id, model_line, target, received_at, source)
        event = event_after(request.id, None, Move(Status.QUEUED, actor, "submitted"), self._clock())
        announced = self._journal.announce(request, event)
        try:
            self._journal.create(request_key(request.id), request.canonical())
        except ConflictError:
            state = self.state(request.id)
            self._journal.drop_stale(announced.entry, state)
            request = self._same_request(state.request, request, timed=received_at is not None)
            if state.last is not None:
                return Receipt.of(request)
            announced = self._journal.announce(request, event)
        with contextlib.suppress(ConflictError):  # it has moved already: queued by a twin of this call, or held
            self._journal.log(event, announced)
        return Receipt.of(request)

    def _draft(
        self, request_id: str, model_line: str, target: Target, received_at: datetime | None, source: str | None
    ) -> DeletionRequest:
        now = as_utc(self._clock())
        received = as_utc(received_at) if received_at else now
        if received > now + _CLOCKS_APART:
            raise UsageError(
                f"request {request_id[:80]!r} is received in the future",
                f"{received.isoformat()}, and it is {now.isoformat()}",
                "correct `received_at`",
            )
        fields = {
            "id": request_id,
            "model_line": model_line,
            "target": target,
            "received_at": received.isoformat(),
            "due_at": due_after_one_month(received).isoformat(),
            "source": source,
        }
        return parse(DeletionRequest, fields, f"request {request_id[:80]!r}")

    def _same_request(self, stored: DeletionRequest, new: DeletionRequest, timed: bool) -> DeletionRequest:
        """Return the stored request if it says the same; the time counts only where it was given."""
        times = {} if timed else {"received_at": stored.received_at, "due_at": stored.due_at}
        if stored.filed_sha256 != new.model_copy(update=times).filed_sha256:
            raise ConflictError(
                f"request {new.id} exists already",
                "it says something else",
                f"look at it with `salun request show {new.id}`, and choose another id for a new request",
            )
        return stored

    def get(self, request_id: str) -> DeletionRequest:
        """Return a request; raises as `reading.read_request`."""
        return reading.read_request(self._store, request_id)

    def events(self, request_id: str) -> Sequence[RequestEvent]:
        """Return all events of a request in their order; raises as `reading.read_events`."""
        return reading.read_events(self._store, request_id)

    def state(self, request_id: str) -> RequestState:
        """Return a request with its last event; raises as `reading.read_request` and `reading.read_last`."""
        return reading.read_state(self._store, request_id)

    def status(self, request_id: str) -> Status:
        """Return where a request stands, by its last event; raises as `reading.read_last`."""
        return status_after(reading.read_last(self._store, request_id))

    def list(
        self, line: str | None = None, status: Status | None = None, due_before: datetime | None = None
    ) -> Sequence[RequestState]:
        """Return requests, those due first at the head.

        Args:
            line: only those of this model line.
            status: only those that stand there.
            due_before: only those due before this time.

        Raises:
            IntegrityError: a document is damaged or missing.
        """
        limit = as_utc(due_before) if due_before else None
        states = self.open_states(line, [status] if status else list(Status))
        return [state for state in states if limit is None or state.request.due < limit]

    def open_states(self, line: str | None, statuses: Collection[Status]) -> Sequence[RequestState]:
        """Return the requests that stand at some statuses, those due first at the head; see `read_standing`."""
        return standing.read_standing(self._store, statuses, line, mend=not self._dry_run)

    def standing(self, status: Status, line: str | None = None) -> Sequence[IndexEntry]:
        """Return the index entries of a status by one listing, the oldest request first; see `index.entries`."""
        return index.entries(self._store, status, line)

    def reindex(self) -> int:
        """Compare the index with all requests and mend it; returns how many entries were wrong or missing."""
        return standing.reindex(self._store, self._dry_run)

    def move(
        self,
        request_id: str,
        to: Status,
        actor: str,
        reason: str,
        run: str | None = None,
        outcome: Outcome | None = None,
        expect: int | None = None,
        *,
        epoch: int | None = None,
        rung: int | None = None,
        group: str | None = None,
    ) -> RequestEvent:
        """Move a request to another status.

        Args:
            request_id: the request.
            to: the status to move to; `retry` and `reopen` are methods of their own.
            actor: who moves it.
            reason: why, without personal data.
            run: the unlearning run that moves it.
            outcome: how it was met; with `completed` only.
            expect: number of the last event that the decision rests on; a request that has moved since is refused.
            epoch: of the model line's lease under which a run moves it.
            rung: the recipe that comes next; that of the last event unless given.
            group: the half of a refused batch that it belongs to.

        Returns:
            The event that was written.

        Raises:
            UsageError: there is no such request, or an argument is not valid.
            ConflictError: it may not move there from where it stands, or somebody else moved it meanwhile.
        """
        state = self.state(request_id)
        number = state.last.n if state.last else 0
        if expect is not None and number != expect:
            raise ConflictError(
                f"request {request_id} has moved since",
                f"its last event is {number}, not {expect}",
                "read it again and decide anew",
            )
        return self.append(state, to, actor, reason, run, outcome, epoch=epoch, rung=rung, group=group)

    def append(
        self,
        state: RequestState,
        to: Status,
        actor: str,
        reason: str,
        run: str | None = None,
        outcome: Outcome | None = None,
        *,
        epoch: int | None = None,
        rung: int | None = None,
        group: str | None = None,
    ) -> RequestEvent:
        """Move a request from the state that it was read in; arguments, result and errors as those of `move`."""
        deliberate = _DELIBERATE.get((state.status, to))
        if deliberate:
            raise ConflictError(
                f"request {state.request.id} is {state.status}",
                "only a deliberate act queues it again",
                f"use `salun request {deliberate} {state.request.id}`",
            )
        return self._append(state, Move(to, actor, reason, run, outcome, epoch, rung, group))

    def hold(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Keep a request from being erased; its month goes on. Raises as `move`."""
        return self.move(request_id, Status.ON_HOLD, actor, reason)

    def cancel(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Withdraw a request that no run has taken up; what it named is redacted. Raises as `move`."""
        return self.move(request_id, Status.CANCELLED, actor, reason)

    def release(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Queue a request that is on hold. Raises as `move`."""
        return self._requeue(request_id, Status.ON_HOLD, actor, reason)

    def retry(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Queue a failed request again, with its attempts counted anew. Raises as `move`."""
        return self._requeue(request_id, Status.FAILED, actor, reason)

    def reopen(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Queue a completed request again, for a rollback past its erasure undid it. Raises as `move`."""
        return self._requeue(request_id, Status.COMPLETED, actor, reason)

    def _requeue(self, request_id: str, source: Status, actor: str, reason: str) -> RequestEvent:
        state = self.state(request_id)
        if state.status is not source:
            raise ConflictError(
                f"request {request_id} is {state.status}", f"that needs one that is {source}", "leave it as it is"
            )
        return self._append(state, Move(Status.QUEUED, actor, reason))

    def _append(self, state: RequestState, move: Move) -> RequestEvent:
        request = state.request
        if state.status in _REDACTED_AT_ONCE:  # a call that was cut off after its event is completed by the next
            self._journal.redact(request.id)
        event = event_after(request.id, state.last, move, self._clock())
        try:
            self._journal.log(event, self._journal.announce(request, event))
        except ConflictError as error:
            raise ConflictError(
                f"request {request.id} was moved by somebody else meanwhile",
                f"event {event.n} exists",
                "read it again and decide anew",
            ) from error
        self._journal.drop_stale(index.entry_now(state), RequestState(request=request, last=event))
        if event.to_status in _REDACTED_AT_ONCE:
            self._journal.redact(request.id)
        return event
