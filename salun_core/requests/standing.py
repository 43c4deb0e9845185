"""Reads the requests that stand at a status by the index, and mends the index as it reads."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime

from salun_core.errors import StoreError
from salun_core.requests import index, reading
from salun_core.requests.index import IndexEntry
from salun_core.requests.schema import RequestState, Status
from salun_core.storage.names import index_prefix
from salun_core.storage.objects import ObjectStore


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
