"""The ledger: every request and every move of one, each a document that is created once and never changed.

A request is `requests/<id>/request.json`; its moves are `requests/<id>/events/<n>.json`. Whoever moves a request
creates event n + 1 of the n that it read: of two who race, the store lets one create it and refuses the other.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from salun_core.config import parse
from salun_core.data.forget import Target
from salun_core.errors import ConflictError, UsageError
from salun_core.requests import reading
from salun_core.requests.deadlines import Clock, as_utc, due_after_one_month
from salun_core.requests.schema import (
    TRANSITIONS,
    DeletionRequest,
    Outcome,
    Receipt,
    RequestEvent,
    RequestState,
    Status,
    next_attempt,
    status_after,
    transition_allowed,
)
from salun_core.storage.names import event_key, request_key
from salun_core.storage.objects import ObjectStore

_CLOCKS_APART = timedelta(minutes=5)
# Ways that only their own method takes, so that no general move takes them by accident.
_DELIBERATE = {(Status.COMPLETED, Status.QUEUED): "reopen", (Status.FAILED, Status.QUEUED): "retry"}


class Ledger:
    """Files, reads and moves deletion requests.

    Args:
        store: where they are kept.
        clock: gives the time now.
        dry_run: check everything and write nothing; what would be written is returned all the same.
    """

    def __init__(self, store: ObjectStore, clock: Clock, dry_run: bool = False) -> None:
        self._store, self._clock, self._dry_run = store, clock, dry_run

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
        event = self._next(request.id, None, Status.QUEUED, actor, "submitted")
        try:
            self._create(request_key(request.id), request.canonical())
        except ConflictError:
            request = self._same_request(request, timed=received_at is not None)
        with contextlib.suppress(ConflictError):  # it has moved already: queued by a twin of this call, or held
            self._create(event_key(request.id, 1), event.canonical())
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

    def _same_request(self, new: DeletionRequest, timed: bool) -> DeletionRequest:
        """Return the stored request if it says the same; the time counts only where it was given."""
        stored = self.get(new.id)
        times = {} if timed else {"received_at": stored.received_at, "due_at": stored.due_at}
        if stored != new.model_copy(update=times):
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
        return RequestState(request=self.get(request_id), last=reading.read_last(self._store, request_id))

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
        states = [
            state for state in reading.read_states(self._store, line, limit) if status is None or state.status == status
        ]
        return sorted(states, key=lambda state: (state.request.due, state.request.id))

    def move(
        self,
        request_id: str,
        to: Status,
        actor: str,
        reason: str,
        run: str | None = None,
        outcome: Outcome | None = None,
        expect: int | None = None,
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

        Returns:
            The event that was written.

        Raises:
            UsageError: there is no such request, or an argument is not valid.
            ConflictError: it may not move there from where it stands, or somebody else moved it meanwhile.
        """
        last = reading.read_last(self._store, request_id)
        number = last.n if last else 0
        if expect is not None and number != expect:
            raise ConflictError(
                f"request {request_id} has moved since",
                f"its last event is {number}, not {expect}",
                "read it again and decide anew",
            )
        deliberate = _DELIBERATE.get((status_after(last), to))
        if deliberate:
            raise ConflictError(
                f"request {request_id} is {status_after(last)}",
                "only a deliberate act queues it again",
                f"use `salun request {deliberate} {request_id}`",
            )
        return self._append(request_id, last, to, actor, reason, run, outcome)

    def hold(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Keep a request from being erased; its month goes on. Raises as `move`."""
        return self.move(request_id, Status.ON_HOLD, actor, reason)

    def cancel(self, request_id: str, actor: str, reason: str) -> RequestEvent:
        """Withdraw a request that no run has taken up. Raises as `move`."""
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
        last = reading.read_last(self._store, request_id)
        if status_after(last) is not source:
            raise ConflictError(
                f"request {request_id} is {status_after(last)}", f"that needs one that is {source}", "leave it as it is"
            )
        return self._append(request_id, last, Status.QUEUED, actor, reason)

    def _append(
        self,
        request_id: str,
        last: RequestEvent | None,
        to: Status,
        actor: str,
        reason: str,
        run: str | None = None,
        outcome: Outcome | None = None,
    ) -> RequestEvent:
        event = self._next(request_id, last, to, actor, reason, run, outcome)
        try:
            self._create(event_key(request_id, event.n), event.canonical())
        except ConflictError as error:
            raise ConflictError(
                f"request {request_id} was moved by somebody else meanwhile",
                f"event {event.n} exists",
                "read it again and decide anew",
            ) from error
        return event

    def _next(
        self,
        request_id: str,
        last: RequestEvent | None,
        to: Status,
        actor: str,
        reason: str,
        run: str | None = None,
        outcome: Outcome | None = None,
    ) -> RequestEvent:
        source = status_after(last)
        if not transition_allowed(source, to):
            ways = ", ".join(sorted(TRANSITIONS[source])) or "nowhere"
            raise ConflictError(
                f"request {request_id} cannot go from {source} to {to}",
                f"from {source} it may go to {ways}",
                f"look at it with `salun request show {request_id}`",
            )
        fields = {
            "request": request_id,
            "n": last.n + 1 if last else 1,
            "at": as_utc(self._clock()).isoformat(),
            "actor": actor,
            "from_status": source,
            "to_status": to,
            "reason": reason,
            "attempt": next_attempt(last, to),
            "run": run,
            "outcome": outcome,
            "writer": secrets.token_hex(16),
        }
        return parse(RequestEvent, fields, f"a move of request {request_id}")

    def _create(self, key: str, data: bytes) -> None:
        if not self._dry_run:
            self._store.put_new(key, data)
            return
        stored = self._store.get(key)
        if stored is not None and stored.data != data:
            raise ConflictError(f"{key} exists already", "it holds other content", "read it")
