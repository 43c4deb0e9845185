"""The ledger of deletion requests: every request and event is a document that is created once.

A request's events are numbered from 1, and each is written on the condition that its number is free. So two processes
that move the same request never both succeed, and the loser gets a `ConflictError`. The index entry is written around
the event; see `salun_core.requests.index` for that order.

Filing writes the index entry, then the request, then its first event (received -> queued):

- The process dies before the request is written: nothing was filed, and the entry is ignored and later deleted.
- It dies before the event: the request is stored with the status `received`. Filing it again writes the event.
- The reply is lost, or a twin of the call was faster: filing again finds the same request and returns its receipt.

A cancelled or rejected request is redacted after its event. If the process dies in between, the next transition of this
request redacts it before it is refused, and `salun purge` redacts it too.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from salun_core.config import parse
from salun_core.data.targets import Target
from salun_core.digest import sha256_bytes
from salun_core.errors import ConflictError, UsageError
from salun_core.gate import Assurance
from salun_core.requests import index, reading
from salun_core.requests.index import IndexedWriter, IndexEntry
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import (
    TRANSITIONS,
    DeletionRequest,
    Outcome,
    Receipt,
    RequestEvent,
    RequestState,
    Review,
    Status,
    Tried,
    status_after,
)
from salun_core.storage.keys import request_key
from salun_core.storage.objects import Entry, ObjectStore, StoredObject
from salun_core.times import Clock, as_utc, due_after_one_month

_CLOCKS_APART = timedelta(minutes=5)  # a client's clock may be ahead of ours by this much
# Only these methods reopen a settled or failed request, so that no other transition does it by accident.
_DELIBERATE = {(Status.COMPLETED, Status.QUEUED): "reopen", (Status.FAILED, Status.QUEUED): "retry"}
# These will not be erased. A completed request is redacted when it is settled, with hashes in case it is reopened.
_REDACTED_AT_ONCE = {Status.CANCELLED, Status.REJECTED}


@dataclass(frozen=True)
class Transition:
    """Where a request moves, and why.

    Args:
        outcome: with `completed` how the request was met; with `on_hold` what a person must review.
        epoch: of the model line's lease that the run holds.
        level: escalation level of the next recipe; None keeps the level of the event before.
        group: the half of a refused batch that it belongs to.
        known_only: a person decided to leave out names that the data do not have; later events repeat it.
        assurance: with `completed` how sure the outcome is.
        tried: recipes that were refused; None keeps those of the event before.
    """

    to: Status
    actor: str
    reason: str
    run: str | None = None
    outcome: Outcome | Review | None = None
    epoch: int | None = None
    level: int | None = None
    group: str | None = None
    known_only: bool = False
    assurance: Assurance | None = None
    tried: Sequence[Tried] | None = None


def build_event(request_id: str, last: RequestEvent | None, transition: Transition, now: datetime) -> RequestEvent:
    """Build the event of a transition; ConflictError if the status of the request does not allow it.

    The attempt is 1 at first, one more each time a run returns the request, and 1 again when a person queues it after
    it failed or was completed; the escalation starts again with it, at level 0.
    """
    source, to = status_after(last), transition.to
    if to not in TRANSITIONS[source]:
        allowed = ", ".join(sorted(TRANSITIONS[source])) or "no other status"
        raise ConflictError(
            f"request {request_id} cannot move from {source} to {to}",
            f"from {source} it may move to {allowed}",
            f"look at it with `salun request show {request_id}`",
        )
    attempt, level, tried = 1, 0, None
    if last is not None and source not in {Status.FAILED, Status.COMPLETED}:
        returned = source is Status.IN_PROGRESS and to is Status.QUEUED
        attempt, level, tried = last.attempt + returned, last.rung, last.tried
    known_only = transition.known_only or bool(last and last.known_only and source is not Status.COMPLETED)
    fields = {
        "request": request_id,
        "n": last.n + 1 if last else 1,
        "at": as_utc(now).isoformat(),
        "actor": transition.actor,
        "from_status": source,
        "to_status": to,
        "reason": transition.reason,
        "attempt": attempt,
        "run": transition.run,
        "outcome": transition.outcome,
        "assurance": transition.assurance,
        "known_only": known_only or None,
        "previous": sha256_bytes(last.canonical()) if last else None,
        "epoch": transition.epoch,
        "rung": level if transition.level is None else transition.level,
        "tried": tried if transition.tried is None else (list(transition.tried) or None),
        "group": transition.group,
        "writer": secrets.token_hex(16),
    }
    return parse(RequestEvent, fields, f"a transition of request {request_id}")


class Ledger:
    """Files, reads and moves deletion requests.

    In a dry run it checks everything and writes nothing; the methods return what they would write.
    """

    def __init__(self, store: ObjectStore, clock: Clock, dry_run: bool = False) -> None:
        self._store = _DryRun(store) if dry_run else store
        self._clock, self._writer = clock, IndexedWriter(self._store)

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

        It also completes an earlier call that died between the request and its first event. `received_at` is when the
        person asked, by default now. ConflictError if another request has this id.
        """
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
        request = parse(DeletionRequest, fields, f"request {request_id[:80]!r}")
        event = build_event(request.id, None, Transition(Status.QUEUED, actor, "submitted"), now)
        reserved = self._writer.reserve(request, event)
        try:
            self._store.put_new(request_key(request.id), request.canonical())
        except ConflictError:
            state = self.state(request.id)
            self._writer.drop_stale(reserved[0], state)
            request = _same_request(state.request, request, timed=received_at is not None)
            if state.last is not None:
                return Receipt.of(request)
            reserved = self._writer.reserve(request, event)
        with contextlib.suppress(ConflictError):  # it moved meanwhile: a twin of this call queued it, or it was held
            self._writer.write_event(event, reserved)
        return Receipt.of(request)

    def get(self, request_id: str) -> DeletionRequest:
        """Return a request; raises as `reading.read_request`."""
        return reading.read_request(self._store, request_id)

    def events(self, request_id: str) -> Sequence[RequestEvent]:
        """Return all events of a request in order; raises as `reading.read_events`."""
        return reading.read_events(self._store, request_id)

    def state(self, request_id: str) -> RequestState:
        """Return a request with its last event; raises as `reading.read_state`."""
        return reading.read_state(self._store, request_id)

    def status(self, request_id: str) -> Status:
        """Return the status of a request from its last event alone; raises as `reading.read_last`."""
        return status_after(reading.read_last(self._store, request_id))

    def list(
        self,
        line: str | None = None,
        statuses: Collection[Status] = tuple(Status),
        due_before: datetime | None = None,
    ) -> Sequence[RequestState]:
        """Return requests, the earliest due first; see `index.read_states`."""
        limit = as_utc(due_before) if due_before else None
        states = index.read_states(self._store, statuses, line)
        return [state for state in states if limit is None or state.request.due < limit]

    def entries(self, status: Status, line: str | None = None) -> Sequence[IndexEntry]:
        """Return the index entries of a status from one listing, the oldest request first; see `index.entries`."""
        return index.entries(self._store, status, line)

    def reindex(self) -> int:
        """Compare the index with all requests and mend it; returns how many entries were wrong or missing."""
        return index.reindex(self._store)

    def move(self, request: str | RequestState, transition: Transition) -> RequestEvent:
        """Move a request to another status and return the event; `retry` and `reopen` have their own methods.

        Given a state, it refuses a request that moved since that was read. ConflictError if the status does not allow
        the transition, or another process moved the request meanwhile.
        """
        state = self.state(request) if isinstance(request, str) else request
        verb = _DELIBERATE.get((state.status, transition.to))
        if verb:
            raise ConflictError(
                f"request {state.request.id} is {state.status}",
                "only a person queues it again",
                f"use `salun request {verb} {state.request.id}`",
            )
        return self._append(state, transition)

    def hold(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Keep a request from being erased; its month continues. Raises as `move`."""
        return self.move(request_id, Transition(Status.ON_HOLD, actor, reason))

    def cancel(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Withdraw a request that no run has claimed, and redact it. Raises as `move`."""
        return self.move(request_id, Transition(Status.CANCELLED, actor, reason))

    def release(self, request_id: str, actor: str, reason: str, known_only: bool = False) -> RequestEvent:
        """Queue a request that is on hold. Raises as `move`.

        A request that was held for review is looked up again by the next sweep, and held again if nothing changed. With
        `known_only` the sweep erases what the data have, and leaves out the names that they do not have.
        """
        return self._requeue(request_id, Status.ON_HOLD, actor, reason, known_only)

    def retry(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Queue a failed request again from its first attempt. Raises as `move`."""
        return self._requeue(request_id, Status.FAILED, actor, reason)

    def reopen(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Queue a completed request again, because a rollback undid its erasure. Raises as `move`."""
        return self._requeue(request_id, Status.COMPLETED, actor, reason)

    def _requeue(
        self, request_id: str, source: Status, actor: str, reason: str, known_only: bool = False
    ) -> RequestEvent:
        state = self.state(request_id)
        if state.status is not source:
            raise ConflictError(
                f"request {request_id} is {state.status}", f"this needs a request that is {source}", "leave it as it is"
            )
        return self._append(state, Transition(Status.QUEUED, actor, reason, known_only=known_only))

    def _append(self, state: RequestState, transition: Transition) -> RequestEvent:
        request = state.request
        if state.status in _REDACTED_AT_ONCE:  # completes a call that died after its event
            redact_request(self._store, request.id, keep_hashes=False)
        event = build_event(request.id, state.last, transition, self._clock())
        try:
            self._writer.write_event(event, self._writer.reserve(request, event))
        except ConflictError as error:
            raise ConflictError(
                f"another process moved request {request.id} meanwhile",
                f"event {event.n} exists",
                "read it again and decide again",
            ) from error
        self._writer.drop_stale(IndexEntry.expected(state), RequestState(request=request, last=event))
        if event.to_status in _REDACTED_AT_ONCE:
            redact_request(self._store, request.id, keep_hashes=False)
        return event


class _DryRun:
    """A store that checks the conditions of writes and writes nothing."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def get(self, key: str) -> StoredObject | None:
        return self._store.get(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self._store.list(prefix)

    def put_new(self, key: str, data: bytes) -> str:
        stored = self._store.get(key)
        if stored is not None and stored.data != data:
            raise ConflictError(f"{key} exists already", "it holds other content", "read it")
        return stored.etag if stored else ""

    def put_if(self, key: str, data: bytes, etag: str) -> str:
        return etag

    def delete(self, key: str) -> None:
        pass


def _same_request(stored: DeletionRequest, new: DeletionRequest, timed: bool) -> DeletionRequest:
    """Return the stored request if it equals the new one; the times count only if the caller gave one."""
    times = {} if timed else {"received_at": stored.received_at, "due_at": stored.due_at}
    if stored.filed_sha256 != new.model_copy(update=times).filed_sha256:
        raise ConflictError(
            f"request {new.id} exists already",
            "its content differs",
            f"look at it with `salun request show {new.id}`, and choose another id for a new request",
        )
    return stored
