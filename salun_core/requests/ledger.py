"""The ledger: every request and every move of one, each a document that is created once and never changed.

A request is `requests/<id>/request.json`; its moves are `requests/<id>/events/<n>.json`. Whoever moves a request
creates event n + 1 of the n that it read: of two who race, the store lets one create it and refuses the other.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from salun_core.config import parse
from salun_core.data.forget import Target
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.requests.deadlines import Clock, as_utc, due_after_one_month
from salun_core.requests.schema import (
    TRANSITIONS,
    DeletionRequest,
    Outcome,
    Receipt,
    RequestEvent,
    RequestState,
    Status,
    transition_allowed,
)
from salun_core.storage.lineage import parse_stored
from salun_core.storage.names import REQUESTS_PREFIX, event_key, events_prefix, request_key
from salun_core.storage.objects import ObjectStore

_READERS = 16
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
        event = self._event_after(request.id, None, Status.QUEUED, actor, "submitted")
        try:
            self._create(request_key(request.id), request.canonical())
        except ConflictError:
            request = self._same_request(request, timed=received_at is not None)
        try:
            self._create(event_key(request.id, 1), event.canonical())
        except ConflictError:  # it has moved already: queued by a twin of this call, or by a person
            pass
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
        """Return a request.

        Raises:
            UsageError: there is none of that id; the nearest is named.
            IntegrityError: the document is damaged, or was moved.
        """
        key = request_key(request_id)
        stored = self._store.get(key)
        if stored is None:
            raise self._unknown(request_id)
        request = parse_stored(DeletionRequest, stored.data, key)
        if request.id != request_id:
            raise IntegrityError(f"{key} is request {request.id!r}", "it was copied or moved", "restore the right one")
        return request

    def _unknown(self, request_id: str) -> UsageError:
        near = difflib.get_close_matches(request_id, self._scan(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return UsageError(
            f"unknown request {request_id!r}", "there is none of that id", f"{hint}`salun request list` shows all"
        )

    def events(self, request_id: str) -> Sequence[RequestEvent]:
        """Return all events of a request in their order.

        Raises:
            UsageError: there is no such request.
            IntegrityError: an event is missing, damaged, or does not follow from the one before.
        """
        count = self._count(request_id)
        if not count:
            self.get(request_id)
        events = [self._event(request_id, number) for number in range(1, count + 1)]
        status = Status.RECEIVED
        for event in events:
            if event.from_status != status:
                raise IntegrityError(
                    f"event {event.n} of request {request_id} does not follow the one before",
                    f"the request was {status}, the event says {event.from_status}",
                    "restore the events from a copy",
                )
            status = event.to_status
        return events

    def state(self, request_id: str) -> RequestState:
        """Return a request with its last event.

        Raises:
            UsageError: there is no such request.
            IntegrityError: a document is damaged or missing.
        """
        return RequestState(request=self.get(request_id), last=self._last(request_id))

    def status(self, request_id: str) -> Status:
        """Return where a request stands, by its last event.

        Raises:
            UsageError: there is no such request.
            IntegrityError: an event is damaged or missing.
        """
        last = self._last(request_id)
        return last.to_status if last else Status.RECEIVED

    def _last(self, request_id: str) -> RequestEvent | None:
        count = self._count(request_id)
        if count:
            return self._event(request_id, count)
        self.get(request_id)  # raises where there is no request either
        return None

    def _count(self, request_id: str) -> int:
        keys = [entry.key for entry in self._store.list(events_prefix(request_id))]
        if keys != [event_key(request_id, number) for number in range(1, len(keys) + 1)]:
            raise _gap(request_id)
        return len(keys)

    def _event(self, request_id: str, number: int) -> RequestEvent:
        key = event_key(request_id, number)
        stored = self._store.get(key)
        if stored is None:
            raise _gap(request_id)
        event = parse_stored(RequestEvent, stored.data, key)
        if (event.request, event.n) != (request_id, number):
            raise IntegrityError(f"{key} is another event", "it was copied or moved", "restore the right one")
        return event

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

        def read(found: tuple[str, int]) -> RequestState | None:
            request = self.get(found[0])
            if (line is not None and request.model_line != line) or (limit is not None and request.due >= limit):
                return None
            state = RequestState(request=request, last=self._event(*found) if found[1] else None)
            return state if status in {None, state.status} else None

        with ThreadPoolExecutor(_READERS) as pool:
            states = [state for state in pool.map(read, self._scan().items()) if state]
        return sorted(states, key=lambda state: (state.request.due, state.request.id))

    def _scan(self) -> dict[str, int]:
        """Return the ids of all requests with their numbers of events, by one listing."""
        requests: set[str] = set()
        numbers: dict[str, int] = {}
        for entry in self._store.list(REQUESTS_PREFIX):
            request_id, _, rest = entry.key[len(REQUESTS_PREFIX) :].partition("/")
            if rest == "request.json":
                requests.add(request_id)
            else:
                numbers[request_id] = numbers.get(request_id, 0) + 1
        return {request_id: numbers.get(request_id, 0) for request_id in sorted(requests)}

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
        last = self._last(request_id)
        number = last.n if last else 0
        if expect is not None and number != expect:
            raise ConflictError(
                f"request {request_id} has moved since",
                f"its last event is {number}, not {expect}",
                "read it again and decide anew",
            )
        deliberate = _DELIBERATE.get((_status(last), to))
        if deliberate:
            raise ConflictError(
                f"request {request_id} is {_status(last)}",
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
        last = self._last(request_id)
        if _status(last) is not source:
            raise ConflictError(
                f"request {request_id} is {_status(last)}", f"that needs one that is {source}", "leave it as it is"
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
        event = self._event_after(request_id, last, to, actor, reason, run, outcome)
        try:
            self._create(event_key(request_id, event.n), event.canonical())
        except ConflictError as error:
            raise ConflictError(
                f"request {request_id} was moved by somebody else meanwhile",
                f"event {event.n} exists",
                "read it again and decide anew",
            ) from error
        return event
