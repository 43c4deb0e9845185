"""Leases: one worker at a time for each model line, by the store's clock.

A lease avoids duplicate work; it does not protect the line. What can happen:

- The holder is killed: its last write stays, and after `seconds` on the store's clock another run takes the lease.
- Two runs take a free lease at once: both send a conditional write, one wins, the other gets a ConflictError.
- The reply to a write is lost: the store reads it back (see `s3`), so the holder does not mistake itself for a rival.
- The holder is suspended past its lease and wakes up: its next `renew` fails, because the holder or epoch is another.
  If it publishes before it renews, it is fenced by the parent: `publish_head` refuses a version whose parent is not
  HEAD any more. If nobody published meanwhile, its version is as good as the other's, and the other is refused.

Both times of a comparison are the store's own (`Last-Modified` and `Date`), so a wrong clock in a pod has no effect.
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
    """Return a line's lease, held or not, or None if there never was one.

    Raises:
        IntegrityError: the document is damaged.
    """
    found = _read(store, line)
    return found[0] if found else None


def holder_of(store: ObjectStore, line: str) -> str | None:
    """Return the run that holds a line's lease now, by the store's clock, or None.

    Raises:
        IntegrityError: the document is damaged.
        StoreError: the store sends no time.
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
        ConflictError: another run holds it, or has just taken it.
        StoreError: the store sends no time, or is unreachable.
    """
    found = _read(store, line)
    if found is None:
        lease = Lease(line=line, holder=holder, epoch=1, beat=1, seconds=seconds)
        store.put_new(lease_key(line), _bytes(lease))
        return lease
    held, stored = found
    own = held.holder == holder and not held.released
    if not own and not _free(held, stored):
        raise ConflictError(
            f"another run works on model line {line}",
            f"run {held.holder} holds its lease, for at most {held.seconds} s after its last renewal",
            "wait for it; you need not do anything",
        )
    epoch = held.epoch if own else held.epoch + 1
    lease = Lease(line=line, holder=holder, epoch=epoch, beat=held.beat + 1, seconds=seconds)
    store.put_if(lease_key(line), _bytes(lease), stored.etag)
    return lease


def renew(store: ObjectStore, lease: Lease) -> Lease:
    """Renew a lease from now on.

    Raises:
        ConflictError: another run holds it, or it was released.
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
    """Give a lease back; the lease of another run stays.

    Returns:
        Whether it was held by this run.
    """
    found = _read(store, line)
    if found is None or found[0].holder != holder or found[0].released:
        return False
    lease = found[0].model_copy(update={"beat": found[0].beat + 1, "released": True})
    try:
        store.put_if(lease_key(line), _bytes(lease), found[1].etag)
    except ConflictError:  # it ran out, and another run took it after it was read
        return False
    return True


def _read(store: ObjectStore, line: str) -> tuple[Lease, StoredObject] | None:
    stored = store.get(lease_key(line))
    if stored is None:
        return None
    lease = parse_stored(Lease, stored.data, lease_key(line))
    if lease.line != line:
        raise IntegrityError(
            f"the lease of {line} belongs to {lease.line!r}",
            "it was copied or moved",
            "delete it: the next run writes a new one",
        )
    return lease, stored


def _free(lease: Lease, stored: StoredObject) -> bool:
    if lease.released:
        return True
    if stored.served is None:
        raise StoreError("the store sends no time", "its answers have no Date header", "remove the proxy that drops it")
    return stored.served - stored.modified > timedelta(seconds=lease.seconds) + _RESOLUTION


def _bytes(lease: Lease) -> bytes:
    return lease.model_dump_json().encode()
