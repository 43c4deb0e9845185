"""Holds a model line for a run: takes its lease, renews it while a block of work runs, and gives it back.

A pipeline works in many pods, one after the other. Each of them renews the lease first thing and then beats; between
two pods nobody does. What can happen:

- The process is killed: its last beat counts, and the line is free one lease later, or as soon as the next claim sees
  that the run is dead (`liveness`).
- The store cannot be reached for a while: the thread tries again at its next beat. A lease has three of them, so one
  that is missed costs nothing.
- The pod waited for a node longer than the lease, and another run took the line: the first renewal fails, and the block
  does not start. That run has settled this one.
- The process is suspended in the block, and another run takes the line: the thread ends at its next beat. The block
  goes on, since it cannot be stopped from here. The log of the run has ended, so that no later step begins, and its
  publish is refused by the log or by the parent.
- Two pods of a run beat at once: their conditional writes meet, and the later one reads the lease again.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from salun_core.errors import RunSettledError, SalunError
from salun_core.storage.leases import Lease, acquire, lost, read_lease, release, renew
from salun_core.storage.objects import ObjectStore
from salun_core.sweeps.liveness import here, life_of
from salun_core.sweeps.policy import LEASE_SECONDS
from salun_core.telemetry.logs import get_logger

_BEATS = 3  # renewals before a lease would end


def hold_line(store: ObjectStore, line: str, run: str, seconds: int = LEASE_SECONDS) -> Lease:
    """Take the lease of a line for a run, or keep it; from a holder that is dead it is taken at once.

    The lease holds `seconds` after its last renewal. LineHeldError if another run holds the line.
    """
    return acquire(store, line, run, seconds, here(), life_of)


@contextmanager
def line_held(store: ObjectStore, line: str, run: str, seconds: int = LEASE_SECONDS) -> Iterator[None]:
    """Hold a line while the block runs, and give it back at its end, however it ends.

    LineHeldError if another run holds the line.
    """
    lease = hold_line(store, line, run, seconds)
    try:
        with beating(store, lease):
            yield
    finally:
        release(store, line, run)


@contextmanager
def lease_renewed(store: ObjectStore, line: str, run: str, seconds: int = LEASE_SECONDS) -> Iterator[None]:
    """Renew the lease of a line at once and then every third of `seconds`, while the block runs.

    RunSettledError if the run does not hold the line any more; the block does not start then.
    """
    lease = read_lease(store, line)
    if lease is None or (lease.holder, lease.released) != (run, False):
        raise lost(line, run, lease)
    lease = lease.model_copy(update={"seconds": seconds})
    _beat(store, lease)
    with beating(store, lease):
        yield


@contextmanager
def beating(store: ObjectStore, lease: Lease) -> Iterator[None]:
    """Renew a lease that was just written every third of it, in a thread, while the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(lease.seconds / _BEATS):
            try:
                _beat(store, lease)
            except RunSettledError as error:
                get_logger().warning("lease_lost", model_line=lease.line, error=error.why)
                return

    # A copy of the context, so that the thread's log lines carry the run.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(beat,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(store: ObjectStore, lease: Lease) -> None:
    try:
        renew(store, lease)
    except RunSettledError:
        raise
    except SalunError as error:  # the next beat may get through
        get_logger().warning("lease_not_renewed", model_line=lease.line, error=type(error).__name__)
