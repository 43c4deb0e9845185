"""Reads requests and their events from the store, and refuses documents that are damaged, moved or missing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from salun_core.digest import sha256_bytes
from salun_core.errors import IntegrityError, UsageError
from salun_core.requests.schema import DeletionRequest, RequestEvent, RequestState, Status
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import event_key, events_prefix, request_key, requests_prefix
from salun_core.storage.objects import ObjectStore

READERS = 16
"""How many threads read requests."""


def read_request(store: ObjectStore, request_id: str) -> DeletionRequest:
    """Return a request; UsageError if no request has this id, with the nearest id."""
    stored = store.get(request_key(request_id))
    if stored is None:
        raise unknown_request(store, request_id)
    return parse_request(stored.data, request_id)


def parse_request(data: bytes, request_id: str) -> DeletionRequest:
    """Parse the stored document of a request; IntegrityError if it is damaged, or belongs to another request."""
    key = request_key(request_id)
    request = parse_stored(DeletionRequest, data, key)
    if request.id != request_id:
        raise IntegrityError(f"{key} is request {request.id!r}", "it was copied or moved", "restore the right one")
    return request


def unknown_request(store: ObjectStore, request_id: str) -> UsageError:
    """Return the error for an id that no request has, with the nearest id."""
    near = difflib.get_close_matches(request_id, _scan(store), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(
        f"unknown request {request_id!r}", "no request has this id", f"{hint}`salun request list` shows all"
    )


def find_state(store: ObjectStore, request_id: str) -> RequestState | None:
    """Return a request with its last event, or None if no request has this id."""
    stored = store.get(request_key(request_id))
    if stored is None:
        return None
    count = _count_events(store, request_id)
    last = _read_event(store, request_id, count) if count else None
    return RequestState(request=parse_request(stored.data, request_id), last=last)


def read_state(store: ObjectStore, request_id: str) -> RequestState:
    """Return a request with its last event; UsageError if no request has this id."""
    state = find_state(store, request_id)
    if state is None:
        raise unknown_request(store, request_id)
    return state


def read_last(store: ObjectStore, request_id: str) -> RequestEvent | None:
    """Return the last event of a request, or None if it has no events yet; the request itself is not read."""
    count = _count_events(store, request_id)
    if count:
        return _read_event(store, request_id, count)
    read_request(store, request_id)
    return None


def read_events(store: ObjectStore, request_id: str) -> Sequence[RequestEvent]:
    """Return all events in order; IntegrityError if one is missing or does not follow from the one before."""
    count = _count_events(store, request_id)
    if not count:
        read_request(store, request_id)
    events = [_read_event(store, request_id, number) for number in range(1, count + 1)]
    status, previous = Status.RECEIVED, None
    for event in events:
        if event.from_status != status or event.previous != previous:
            raise IntegrityError(
                f"event {event.n} of request {request_id} does not follow from the one before",
                f"the request was {status}, the event starts from {event.from_status}, or it names another event",
                "restore the events from a copy",
            )
        status, previous = event.to_status, sha256_bytes(event.canonical())
    return events


def read_all(store: ObjectStore) -> Sequence[RequestState]:
    """Return all requests with their last events, without the index; many threads read them."""

    def read(found: tuple[str, int]) -> RequestState:
        request_id, count = found
        last = _read_event(store, request_id, count) if count else None
        return RequestState(request=read_request(store, request_id), last=last)

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, _scan(store).items()))


def _scan(store: ObjectStore) -> dict[str, int]:
    """Return the number of events by request id, from one listing."""
    requests: set[str] = set()
    counts: dict[str, int] = {}
    for entry in store.list(requests_prefix()):
        request_id, _, rest = entry.key[len(requests_prefix()) :].partition("/")
        if rest == "request.json":
            requests.add(request_id)
        else:
            counts[request_id] = counts.get(request_id, 0) + 1
    return {request_id: counts.get(request_id, 0) for request_id in sorted(requests)}


def _count_events(store: ObjectStore, request_id: str) -> int:
    keys = [entry.key for entry in store.list(events_prefix(request_id))]
    if keys != [event_key(request_id, number) for number in range(1, len(keys) + 1)]:
        raise _gap(request_id)
    return len(keys)


def _read_event(store: ObjectStore, request_id: str, number: int) -> RequestEvent:
    key = event_key(request_id, number)
    stored = store.get(key)
    if stored is None:
        raise _gap(request_id)
    event = parse_stored(RequestEvent, stored.data, key)
    if (event.request, event.n) != (request_id, number):
        raise IntegrityError(f"{key} is another event", "it was copied or moved", "restore the right one")
    return event


def _gap(request_id: str) -> IntegrityError:
    return IntegrityError(
        f"the events of request {request_id} are incomplete",
        "they must be numbered from 1 without a gap; an event is missing or an extra file is there",
        "restore them from a copy",
    )
