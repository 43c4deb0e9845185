"""The index of request states: small objects whose keys hold all that a claim needs, repaired on read."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from salun_core.errors import ConflictError, IntegrityError, StoreError, UsageError
from salun_core.requests import index, reading
from salun_core.requests.schema import DeletionRequest, RequestState, Status
from salun_core.storage.keys import index_key, index_prefix
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


def read_standing(
    store: ObjectStore, statuses: Collection[Status], line: str | None = None, mend: bool = True
) -> Sequence[RequestState]:
    """Return the requests that stand at some statuses, those due first at the head.

    A request that moves twice while this reads may be missed; the next call finds it.

    Args:
        store: where they are kept.
        statuses: the statuses.
        line: only those of this model line.
        mend: delete the entries that turn out to be stale.

    Raises:
        IntegrityError: a document is damaged or missing.
    """
    found = [entry for status in _folders(set(statuses)) for entry in index.entries(store, status, line)]
    if set(statuses) == {Status.RECEIVED}:
        found = [entry for entry in found if entry.n == 1]
    states = [state for state in read_entries(store, found, mend) if state.status in statuses]
    return sorted(states, key=lambda state: (state.request.due, state.request.id))


def _folders(statuses: set[Status]) -> Sequence[Status]:
    """Return the folders to list: that of the queued first and last, for most moves come from there or go there.

    What was received and no more is there too.
    """
    others = [status for status in Status if status in statuses - {Status.QUEUED, Status.RECEIVED}]
    queued = [Status.QUEUED] if statuses & {Status.QUEUED, Status.RECEIVED} else []
    return [*queued, *others, *(queued if others else [])]


def read_entries(store: ObjectStore, entries: Sequence[IndexEntry], mend: bool = True) -> Sequence[RequestState]:
    """Return the requests of index entries, each once and in their order, read by many threads.

    They stand where they stand, which need not be where an entry says.

    Args:
        store: where they are kept.
        entries: the entries.
        mend: delete those that turn out to be stale.

    Raises:
        IntegrityError: a document is damaged or missing.
    """
    of: dict[str, set[IndexEntry]] = {}
    for entry in entries:
        of.setdefault(entry.request, set()).add(entry)
    now = index.store_time(entries)

    def read(request_id: str) -> RequestState | None:
        state = reading.find_state(store, request_id)
        if mend:
            with contextlib.suppress(StoreError):  # whoever may only read leaves it to others
                _mend(store, of[request_id], state, now)
        return state

    with ThreadPoolExecutor(reading.READERS) as pool:
        return [state for state in pool.map(read, of) if state]


def _mend(store: ObjectStore, entries: Collection[IndexEntry], state: RequestState | None, now: datetime | None) -> int:
    """Delete the entries of a request that are stale or were left behind; returns how many."""
    count = 0
    for entry in entries:
        if state is not None and index.is_stale(entry, state):
            index.drop(store, entry)
        elif index.is_left_behind(entry, state, now):
            _drop_left_behind(store, entry)
        else:
            continue
        count += 1
    return count


def _drop_left_behind(store: ObjectStore, entry: IndexEntry) -> None:
    """Delete an entry of long ago; should its move be made in this very moment, put it back."""
    index.drop(store, entry)
    state = reading.find_state(store, entry.request)
    if state is not None and index.entry_now(state) == entry:
        index.put(store, entry, secrets.token_hex(16))


def reindex(store: ObjectStore, dry_run: bool = False) -> int:
    """Compare the whole index with all requests: put what is missing, delete what is wrong.

    It is needed after a restored backup only, and may run while requests move.

    Args:
        store: where they are kept.
        dry_run: write nothing.

    Returns:
        How many entries were put or deleted, or would be.

    Raises:
        IntegrityError: a request or an event is damaged or missing.
    """
    states = {state.request.id: state for state in reading.read_all(store)}
    found, strange = _whole_index(store)
    missing = {index.entry_now(state) for state in states.values()} - found
    wrong, now = {}, index.store_time(found)
    for entry in found:
        state = states.get(entry.request)
        if (state is not None and index.is_stale(entry, state)) or index.is_left_behind(entry, state, now):
            wrong[entry] = state
    if not dry_run:
        for entry in missing:
            index.put(store, entry, secrets.token_hex(16))
        for entry, state in wrong.items():
            _mend(store, [entry], state, now)
        for key in strange:
            store.delete(key)
    return len(missing) + len(wrong) + len(strange)


def _whole_index(store: ObjectStore) -> tuple[set[IndexEntry], list[str]]:
    """Return all entries, and the keys among them that are none."""
    found: set[IndexEntry] = set()
    strange: list[str] = []
    for row in (row for status in Status for row in store.list(index_prefix(status))):
        entry = index.parse_key(row.key)
        if entry is None:
            strange.append(row.key)
        else:
            found.add(replace(entry, modified=row.modified))
    return found, strange
