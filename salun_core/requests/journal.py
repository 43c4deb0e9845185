"""Writes what the ledger writes, in the order that keeps the index right wherever a call is killed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from salun_core.errors import ConflictError, StoreError
from salun_core.requests import index, reading
from salun_core.requests.index import IndexEntry
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import DeletionRequest, RequestEvent, RequestState
from salun_core.storage.names import event_key
from salun_core.storage.objects import ObjectStore

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
