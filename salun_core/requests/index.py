"""The index of request statuses: small objects whose keys hold all that a claim needs, so that one listing finds it.

The events are the truth and the index follows them. `IndexedWriter` writes in this order:

1. Reserve: put the entry of the new event (status, line, time of receipt, event number, request).
2. Write the event, on the condition that its number is free.
3. Drop the entry of the event before.

Failures and what follows from them:

- The process dies after 1. The entry names an event that does not exist. Readers check every entry against its
  request and ignore this one; when it is 24 hours old by the store's clock, a reader deletes it.
- The process dies after 2. Both entries exist. The old one has a lower event number, so it can never become right
  again, and any reader deletes it.
- The process stalls between 1 and 2 for so long that a reader deletes its entry. It puts the entry again after 2 if
  the entry was already there before 1, or if more than an hour has passed.
- Two processes write the same event number. The condition of 2 lets one win; the other drops its own entry.
- The reply of 2 is lost. The store reads the event back; its random `writer` shows whose event it is.

So a request always has the entry of its last event, and at times others that readers recognise as wrong.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from salun_core.errors import ConflictError, IntegrityError, StoreError
from salun_core.requests import reading
from salun_core.requests.schema import DeletionRequest, RequestEvent, RequestState, Status
from salun_core.storage.keys import event_key, index_key, index_prefix
from salun_core.storage.objects import ObjectStore

_ABANDONED_AFTER = timedelta(hours=24)  # an entry without its event is then left from a crash
_SLOW_SECONDS = 3600.0  # far below a day: a writer that took longer puts its entry again


@dataclass(frozen=True)
class IndexEntry:
    """The status of a request since its n-th event.

    Args:
        received: when it was received, in whole seconds since 1970.
        n: number of the event that led to the status.
        modified: the server's time when the entry was put (UTC); None if the entry was not listed.
    """

    request: str
    line: str
    status: Status
    received: int
    n: int
    modified: datetime | None = field(default=None, compare=False)

    @classmethod
    def of(cls, request: DeletionRequest, status: Status, number: int) -> IndexEntry:
        """Return the entry of a request that has a status since its n-th event."""
        return cls(request.id, request.model_line, status, int(request.received.timestamp()), number)

    @classmethod
    def expected(cls, state: RequestState) -> IndexEntry:
        """Return the entry that a request must have; one without events is indexed as queued by its first event."""
        if state.last is None:
            return cls.of(state.request, Status.QUEUED, 1)
        return cls.of(state.request, state.last.to_status, state.last.n)

    @classmethod
    def parse(cls, key: str) -> IndexEntry | None:
        """Return the entry of a key, or None if the key is not a valid entry."""
        values = index_key.match(key)
        if values is None or values["status"] not in set(Status):
            return None
        status, received, number = Status(values["status"]), int(values["second"]), int(values["number"])
        entry = cls(values["request"], values["line"], status, received, number)
        return entry if entry.key == key else None  # a digit of another script has another key

    @property
    def key(self) -> str:
        """Its key in the store."""
        return index_key(self.status, self.line, self.received, self.n, self.request)

    def put(self, store: ObjectStore, writer: str) -> bool:
        """Put the entry, and return whether it was new; `writer` is random, so that two calls write different bytes."""
        try:
            store.put_new(self.key, writer.encode())
        except ConflictError:
            return False
        return True

    def is_stale(self, state: RequestState) -> bool:
        """Return whether the entry can never become right again, so that any process may delete it.

        `state` must have been read after the entry.
        """
        now, last = IndexEntry.expected(state), state.last.n if state.last else 0
        if (self.line, self.received) != (now.line, now.received):
            return True
        return self.n < last or (self.n == last and self.status is not state.status)

    def is_abandoned(self, state: RequestState | None, now: datetime | None) -> bool:
        """Return whether a crash left the entry behind before its event was written.

        `now` is a lower bound of the store's time; `state` is None if the request does not exist.
        """
        if self.modified is None or now is None or now - self.modified <= _ABANDONED_AFTER:
            return False
        return state is None or self != IndexEntry.expected(state)


class IndexedWriter:
    """Writes events together with their index entries."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def reserve(self, request: DeletionRequest, event: RequestEvent) -> tuple[IndexEntry, float]:
        """Put the index entry of an event that will be written next.

        Returns the entry, and until when it is safe from readers, on this machine's monotonic clock.
        """
        entry = IndexEntry.of(request, event.to_status, event.n)
        return entry, time.monotonic() + _SLOW_SECONDS if entry.put(self._store, event.writer) else 0.0

    def write_event(self, event: RequestEvent, reserved: tuple[IndexEntry, float]) -> None:
        """Write an event after its entry was reserved.

        ConflictError if another process has written an event of this number; the reserved entry is dropped.
        """
        entry, safe_until = reserved
        try:
            self._store.put_new(event_key(event.request, event.n), event.canonical())
        except ConflictError:
            self.drop_stale(entry, reading.read_state(self._store, event.request))
            raise
        if time.monotonic() >= safe_until:
            entry.put(self._store, event.writer)

    def drop_stale(self, entry: IndexEntry, state: RequestState) -> None:
        """Delete an entry if it is stale; if the store refuses, the next reader deletes it."""
        if entry.is_stale(state):
            with contextlib.suppress(StoreError):
                self._store.delete(entry.key)


def entries(store: ObjectStore, status: Status, line: str | None = None) -> Sequence[IndexEntry]:
    """Return the entries of a status from one listing, the oldest request first; some may be wrong for a moment."""
    found = []
    for row in store.list(index_prefix(status, line or "")):
        entry = IndexEntry.parse(row.key)
        if entry is None:
            raise IntegrityError(
                f"{row.key} is not a valid index entry", "another program wrote it", "use `salun request reindex`"
            )
        found.append(replace(entry, modified=row.modified))
    return sorted(found, key=lambda entry: (entry.received, entry.request, entry.n))


def read_states(store: ObjectStore, statuses: Collection[Status], line: str | None = None) -> Sequence[RequestState]:
    """Return the requests of some statuses, the earliest due first.

    A request that moves twice during the call may be missed; the next call finds it.
    """
    # Requests without events are indexed as queued. That folder is listed first and last, since most transitions
    # start or end there.
    others = [status for status in Status if status in set(statuses) - {Status.QUEUED, Status.RECEIVED}]
    queued = [Status.QUEUED] if {Status.QUEUED, Status.RECEIVED} & set(statuses) else []
    folders = [*queued, *others, *(queued if others else [])]
    found = [entry for status in folders for entry in entries(store, status, line)]
    if set(statuses) == {Status.RECEIVED}:
        found = [entry for entry in found if entry.n == 1]
    states = [state for state in read_entries(store, found) if state.status in statuses]
    return sorted(states, key=lambda state: (state.request.due, state.request.id))


def read_entries(store: ObjectStore, found: Sequence[IndexEntry]) -> Sequence[RequestState]:
    """Return the requests of index entries, each once and in their order; many threads read them.

    The events decide about the status, which may differ from that of the entry. Entries that are stale or abandoned are
    deleted.
    """
    of: dict[str, set[IndexEntry]] = {}
    for entry in found:
        of.setdefault(entry.request, set()).add(entry)
    now = _store_time(found)

    def read(request_id: str) -> RequestState | None:
        state = reading.find_state(store, request_id)
        with contextlib.suppress(StoreError):  # a reader without the right to delete leaves it to others
            _mend(store, of[request_id], state, now)
        return state

    with ThreadPoolExecutor(reading.READERS) as pool:
        return [state for state in pool.map(read, of) if state]


def reindex(store: ObjectStore) -> int:
    """Compare the whole index with all requests: put what is missing, delete what is wrong, and return how many.

    Only a restored backup needs it. It may run while requests move.
    """
    states = {state.request.id: state for state in reading.read_all(store)}
    rows = [row for status in Status for row in store.list(index_prefix(status))]
    parsed = {row.key: IndexEntry.parse(row.key) for row in rows}
    found = {replace(entry, modified=row.modified) for row in rows if (entry := parsed[row.key]) is not None}
    invalid = [key for key, entry in parsed.items() if entry is None]
    missing = {IndexEntry.expected(state) for state in states.values()} - found
    now = _store_time(found)
    wrong = [entry for entry in found if _is_wrong(entry, states.get(entry.request), now)]
    for entry in missing:
        entry.put(store, secrets.token_hex(16))
    for entry in wrong:
        _mend(store, [entry], states.get(entry.request), now)
    for key in invalid:
        store.delete(key)
    return len(missing) + len(wrong) + len(invalid)


def _store_time(found: Iterable[IndexEntry]) -> datetime | None:
    """Return the latest time of a listing: the store's clock shows this time or a later one."""
    return max((entry.modified for entry in found if entry.modified is not None), default=None)


def _is_wrong(entry: IndexEntry, state: RequestState | None, now: datetime | None) -> bool:
    return (state is not None and entry.is_stale(state)) or entry.is_abandoned(state, now)


def _mend(store: ObjectStore, found: Collection[IndexEntry], state: RequestState | None, now: datetime | None) -> None:
    """Delete the entries of a request that are stale or abandoned."""
    for entry in found:
        if not _is_wrong(entry, state, now):
            continue
        store.delete(entry.key)
        if state is not None and entry.is_stale(state):
            continue
        # The writer of an abandoned entry may wake up and write its event now: then the entry is put back.
        state_after = reading.find_state(store, entry.request)
        if state_after is not None and IndexEntry.expected(state_after) == entry:
            entry.put(store, secrets.token_hex(16))
