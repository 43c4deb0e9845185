"""Leases: one worker at a time for each model line, by the store's clock.

A lease keeps two workers from doing the same work; it is not what keeps the line right. A worker that sleeps
past its lease and wakes up is stopped by the check of the parent when it publishes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from salun_core.config import Document
from salun_core.errors import ConflictError, IntegrityError, StoreError
from salun_core.storage.documents import LineId, RunId, parse_stored
from salun_core.storage.keys import lease_key
from salun_core.storage.objects import ObjectStore, StoredObject

_RESOLUTION = timedelta(seconds=1)  # HTTP dates have whole seconds


class Lease(Document):
    """Who works on a model line; the time of the last beat is the object's own time in the store."""

    format: Literal["salun.lease/v1"] = "salun.lease/v1"
    line: LineId = Field(description="the model line")
    holder: RunId = Field(description="the run that holds it")
    epoch: Annotated[int, Field(ge=1, strict=True)] = Field(description="one more with each holder")
    beat: Annotated[int, Field(ge=1, strict=True)] = Field(description="one more with each write")
    seconds: Annotated[int, Field(ge=1, le=7 * 86400, strict=True)] = Field(
        description="how long it holds after its last beat"
    )
    released: bool = Field(default=False, description="whether the holder gave it back")


def read_lease(store: ObjectStore, line: str) -> Lease | None:
    """Return a line's lease, held or not; None where there was never one.

    Raises:
        IntegrityError: the document is damaged.
    """
    found = _read(store, line)
    return found[0] if found else None


def holder_of(store: ObjectStore, line: str) -> str | None:
    """Return the run that holds a line's lease now, by the store's clock; None where nobody does.

    Raises:
        IntegrityError: the document is damaged.
        StoreError: the store tells no time.
    """
    found = _read(store, line)
    return found[0].holder if found and not _free(*found) else None


def acquire(store: ObjectStore, line: str, holder: str, seconds: int) -> Lease:
    """Take the lease of a line, or keep one's own.

    Args:
        store: where.
        line: the model line.
        holder: the run that wants it.
        seconds: how long it holds from now on, unless it is renewed.

    Returns:
        The lease; its epoch is higher than that of each earlier holder.

    Raises:
        ConflictError: another run holds it, or took it just now.
        StoreError: the store tells no time, or cannot be reached.
    """
    found = _read(store, line)
    if found is None:
        lease = Lease(line=line, holder=holder, epoch=1, beat=1, seconds=seconds)
        store.put_new(lease_key(line), _bytes(lease))
        return lease
    held, stored = found
    ours = held.holder == holder and not held.released
    if not ours and not _free(held, stored):
        raise ConflictError(
            f"another run works on model line {line}",
            f"{held.holder} holds its lease, for at most {held.seconds} s after its last sign of life",
            "wait for it; nothing needs to be done",
        )
    epoch = held.epoch if ours else held.epoch + 1
    lease = Lease(line=line, holder=holder, epoch=epoch, beat=held.beat + 1, seconds=seconds)
    store.put_if(lease_key(line), _bytes(lease), stored.etag)
    return lease


def renew(store: ObjectStore, lease: Lease) -> Lease:
    """Beat once more.

    Raises:
        ConflictError: the lease is no longer ours.
    """
    found = _read(store, lease.line)
    if found is None or (found[0].holder, found[0].epoch, found[0].released) != (lease.holder, lease.epoch, False):
        raise ConflictError(
            f"run {lease.holder} lost the lease of model line {lease.line}",
            "it was not renewed in time, and another run took it",
            "let this run end: it cannot publish any more once the other has",
        )
    renewed = lease.model_copy(update={"beat": found[0].beat + 1})
    store.put_if(lease_key(lease.line), _bytes(renewed), found[1].etag)
    return renewed


def release(store: ObjectStore, line: str, holder: str) -> bool:
    """Give a lease back; one that is another's is left alone.

    Returns:
        Whether it was ours.
    """
    found = _read(store, line)
    if found is None or found[0].holder != holder or found[0].released:
        return False
    lease = found[0].model_copy(update={"beat": found[0].beat + 1, "released": True})
    try:
        store.put_if(lease_key(line), _bytes(lease), found[1].etag)
    except ConflictError:  # taken over in this very moment
        return False
    return True


def _read(store: ObjectStore, line: str) -> tuple[Lease, StoredObject] | None:
    stored = store.get(lease_key(line))
    if stored is None:
        return None
    lease = parse_stored(Lease, stored.data, lease_key(line))
    if lease.line != line:
        raise IntegrityError(
            f"the lease of {line} is that of {lease.line!r}",
            "it was copied or moved",
            "delete it: the next run writes it",
        )
    return lease, stored


def _free(lease: Lease, stored: StoredObject) -> bool:
    if lease.released:
        return True
    if stored.served is None:
        raise StoreError("the store tells no time", "its answers have no Date header", "remove the proxy that drops it")
    return stored.served - stored.modified > timedelta(seconds=lease.seconds) + _RESOLUTION


def _bytes(lease: Lease) -> bytes:
    return lease.model_dump_json().encode()
