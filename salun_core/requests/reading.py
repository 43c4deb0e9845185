"""Reads requests and their events out of the store, and refuses what is damaged, moved or missing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from salun_core.errors import IntegrityError, UsageError
from salun_core.requests.schema import DeletionRequest, RequestEvent, RequestState, Status
from salun_core.storage.lineage import parse_stored
from salun_core.storage.names import event_key, events_prefix, request_key, requests_prefix
from salun_core.storage.objects import ObjectStore

_READERS = 16


def read_request(store: ObjectStore, request_id: str) -> DeletionRequest:
    """Return a request.

    Raises:
        UsageError: there is none of that id; the nearest is named.
        IntegrityError: the document is damaged, or was moved.
    """
    key = request_key(request_id)
    stored = store.get(key)
    if stored is None:
        raise _unknown(store, request_id)
    request = parse_stored(DeletionRequest, stored.data, key)
    if request.id != request_id:
        raise IntegrityError(f"{key} is request {request.id!r}", "it was copied or moved", "restore the right one")
    return request


def _unknown(store: ObjectStore, request_id: str) -> UsageError:
    near = difflib.get_close_matches(request_id, _scan(store), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(
        f"unknown request {request_id!r}", "there is none of that id", f"{hint}`salun request list` shows all"
    )


def read_events(store: ObjectStore, request_id: str) -> Sequence[RequestEvent]:
    """Return all events of a request in their order.

    Raises:
        UsageError: there is no such request.
        IntegrityError: an event is missing, damaged, or does not follow from the one before.
    """
    count = _count(store, request_id)
    if not count:
        read_request(store, request_id)
    events = [_read_event(store, request_id, number) for number in range(1, count + 1)]
    status = Status.RECEIVED
    for event in events:
        if event.from_status != status:
            raise IntegrityError(
                f"event {event.n} of request {request_id} does not follow from the one before",
                f"the request was {status}, the event says {event.from_status}",
                "restore the events from a copy",
            )
        status = event.to_status
    return events


def read_last(store: ObjectStore, request_id: str) -> RequestEvent | None:
    """Return the last event of a request, or None where it was received and no more.

    Raises:
        UsageError: there is no such request.
        IntegrityError: the event is damaged, or one is missing.
    """
    count = _count(store, request_id)
    if count:
        return _read_event(store, request_id, count)
    read_request(store, request_id)
    return None


def _count(store: ObjectStore, request_id: str) -> int:
    keys = [entry.key for entry in store.list(events_prefix(request_id))]
    if keys != [event_key(request_id, number) for number in range(1, len(keys) + 1)]:
        raise _gap(request_id)
    return len(keys)


def _gap(request_id: str) -> IntegrityError:
    return IntegrityError(
        f"the events of request {request_id} are not whole",
        "they are numbered from 1 without a gap, and something is missing or does not belong there",
        "restore them from a copy",
    )


def _read_event(store: ObjectStore, request_id: str, number: int) -> RequestEvent:
    key = event_key(request_id, number)
    stored = store.get(key)
    if stored is None:
        raise _gap(request_id)
    event = parse_stored(RequestEvent, stored.data, key)
    if (event.request, event.n) != (request_id, number):
        raise IntegrityError(f"{key} is another event", "it was copied or moved", "restore the right one")
    return event


def read_states(store: ObjectStore, line: str | None, due_before: datetime | None) -> Sequence[RequestState]:
    """Return requests with their last events, read by many threads.

    Args:
        store: where they are kept.
        line: only those of this model line.
        due_before: only those due before this time (with its time zone).

    Raises:
        IntegrityError: a document is damaged or missing.
    """

    def read(found: tuple[str, int]) -> RequestState | None:
        request_id, count = found
        request = read_request(store, request_id)
        if line not in {None, request.model_line} or (due_before is not None and request.due >= due_before):
            return None
        last = _read_event(store, request_id, count) if count else None
        return RequestState(request=request, last=last)

    with ThreadPoolExecutor(_READERS) as pool:
        return [state for state in pool.map(read, _scan(store).items()) if state]


def _scan(store: ObjectStore) -> dict[str, int]:
    """Return the ids of all requests with their numbers of events, by one listing."""
    requests: set[str] = set()
    counts: dict[str, int] = {}
    for entry in store.list(requests_prefix()):
        request_id, _, rest = entry.key[len(requests_prefix()) :].partition("/")
        if rest == "request.json":
            requests.add(request_id)
        else:
            counts[request_id] = counts.get(request_id, 0) + 1
    return {request_id: counts.get(request_id, 0) for request_id in sorted(requests)}
