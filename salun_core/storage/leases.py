"""Leases: one worker at a time for each model line, by the store's clock.

A lease avoids duplicate work; it does not protect the line. Its holder renews it while it works. Another run takes it
when it was given back, when its holder is known to be dead, or when it was not renewed in time and its holder is not
known to live (see `sweeps.liveness`). What can happen:

- The holder is killed: its last write stays. The next run takes the lease at once if it can see that the holder is
  dead, and otherwise after `seconds` on the store's clock.
- The holder waits between two steps, so nobody renews: its lease ends, but stays its own as long as it is seen to live.
- Two runs take a free lease at once: both send a conditional write, one wins, the other reads it again and finds the
  line held.
- The holder renews while another run decides that it is dead or late: the conditional write of the other one fails,
  and it reads the lease again.
- The reply to a write is lost: the store reads it back (see `s3`), so the holder does not mistake itself for a rival.
- The holder is suspended past its lease, or was wrongly seen as dead, and wakes up: its next `renew` fails, because
  the holder or epoch is another. Its log has ended, since the run that took over settled it. If it publishes before it
  notices either, it is fenced by the parent: `publish_head` refuses a version whose parent is not HEAD any more. If
  nobody published meanwhile, its version is as good as the other's, and the other is refused.

Both times of a comparison are the store's own (`Last-Modified` and `Date`), so a wrong clock in a pod has no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from salun_core.config import Document
from salun_core.errors import ConflictError, IntegrityError, LineHeldError, RunSettledError, StoreError
from salun_core.storage.documents import Digest, LineId, RunId, parse_stored
from salun_core.storage.keys import lease_key
from salun_core.storage.objects import ObjectStore, StoredObject

_RESOLUTION = timedelta(seconds=1)  # HTTP dates have whole seconds
_TRIES = 5  # of a write that another one came before; each failure means that somebody else got on
SUBMIT_AGAIN = "this run was settled; submit a new sweep"
_KubernetesName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class Life(StrEnum):
    """What is known about the holder of a lease."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


class Place(Document):
    """The Kubernetes object that a holder's steps belong to; whoever finds the line held looks there for its state."""

    namespace: _KubernetesName = Field(description="namespace of the Argo Workflow")
    workflow: _KubernetesName = Field(description="name of the Argo Workflow")
    cluster: Digest = Field(description="SHA-256 of the cluster's certificate authority: names repeat between clusters")


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
    place: Place | None = Field(default=None, description="where the holder runs; none outside of a cluster")
    taken_from: RunId | None = Field(
        default=None, description="the run that it was taken from without being given back"
    )


def unknown_life(lease: Lease) -> Life:
    """Return what is known about a holder when nobody can be asked: time alone decides."""
    return Life.UNKNOWN


def read_lease(store: ObjectStore, line: str) -> Lease | None:
    """Return a line's lease, held or not, or None if there never was one."""
    found = _read(store, line)
    return found[0] if found else None


def holder_of(store: ObjectStore, line: str) -> str | None:
    """Return the run that holds a line's lease now, by the store's clock, or None."""
    found = _read(store, line)
    return found[0].holder if found and not _free(*found) else None


def acquire(
    store: ObjectStore,
    line: str,
    holder: str,
    seconds: int,
    place: Place | None = None,
    life_of: Callable[[Lease], Life] = unknown_life,
) -> Lease:
    """Take the lease of a line, or keep one's own; its epoch is higher than that of each earlier holder.

    LineHeldError if another run holds it, or has just taken it. `life_of` finds out whether the present holder lives,
    and is called only if it holds the line. `seconds` counts from now.
    """
    for _ in range(_TRIES):
        found = _read(store, line)
        epoch, beat, taken_from = 1, 1, None
        if found is not None:
            held, stored = found
            own = held.holder == holder and not held.released
            if not own and not _may_be_taken(held, stored, life_of):
                raise _held(line, held.holder, f"it renewed its lease {_silence(stored)} s ago")
            epoch, beat = held.epoch if own else held.epoch + 1, held.beat + 1
            taken_from = held.taken_from if own else None if held.released else held.holder
        lease = Lease(
            line=line, holder=holder, epoch=epoch, beat=beat, seconds=seconds, place=place, taken_from=taken_from
        )
        try:
            if found is None:
                store.put_new(lease_key(line), _bytes(lease))
            else:
                store.put_if(lease_key(line), _bytes(lease), stored.etag)
        except ConflictError:  # another run took it, or its holder renewed it: look again
            continue
        return lease
    raise _held(line, "another run", "its lease keeps changing")


def _may_be_taken(held: Lease, stored: StoredObject, life_of: Callable[[Lease], Life]) -> bool:
    if held.released:
        return True
    late = _free(held, stored)
    life = life_of(held)
    return life is Life.DEAD or (late and life is not Life.ALIVE)


def _held(line: str, holder: str, why: str) -> LineHeldError:
    return LineHeldError(
        f"line held by {holder}",
        f"that run works on model line {line}, and {why}",
        "wait for it; the next sweep tries again, and takes the line from a run that died",
    )


def _silence(stored: StoredObject) -> int:
    return int((stored.served - stored.modified).total_seconds()) if stored.served else 0


def renew(store: ObjectStore, lease: Lease) -> Lease:
    """Renew a lease from now on, also one that is late, as long as no other run took it.

    RunSettledError if another run holds it, or it was given back. ConflictError if other steps of the run renew it so
    often that this one never succeeds.
    """
    for _ in range(_TRIES):
        found = _read(store, lease.line)
        if found is None or (found[0].holder, found[0].epoch, found[0].released) != (lease.holder, lease.epoch, False):
            raise lost(lease.line, lease.holder, found[0] if found else None)
        renewed = found[0].model_copy(update={"beat": found[0].beat + 1, "seconds": lease.seconds})
        try:
            store.put_if(lease_key(lease.line), _bytes(renewed), found[1].etag)
        except ConflictError:  # another step of the run renewed it, or another run took it
            continue
        return renewed
    raise ConflictError(f"the lease of {lease.line} was not renewed", "other processes kept changing it", "try again")


def lost(line: str, holder: str, now: Lease | None) -> RunSettledError:
    """Return the error of a run that has lost its lease; `now` is the lease as it is now."""
    why = "it was given back when the run was settled"
    if now is None or now.holder != holder:
        why = "it was not renewed in time, and " + (f"run {now.holder} took the line over" if now else "is gone")
    return RunSettledError(f"run {holder} lost the lease of model line {line}", why, SUBMIT_AGAIN)


def release(store: ObjectStore, line: str, holder: str) -> bool:
    """Give a lease back, and return whether this run held it; the lease of another run stays."""
    for _ in range(_TRIES):
        found = _read(store, line)
        if found is None or found[0].holder != holder or found[0].released:
            return False
        lease = found[0].model_copy(update={"beat": found[0].beat + 1, "released": True})
        try:
            store.put_if(lease_key(line), _bytes(lease), found[1].etag)
        except ConflictError:  # a last beat of this run, or another run that took it: look again
            continue
        return True
    return False


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
    return lease.model_dump_json(exclude_none=True).encode()
