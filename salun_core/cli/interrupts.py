"""Ctrl-C and SIGTERM: the verb ends through its own clean-up, or after half a minute without it.

An exception that a signal handler raises can be lost: Python drops it in a destructor or a weak reference's callback
(those of `logging` are called all the time), and one that hits between a lock and its `try` leaves the lock taken.
So the exception is not raised inside `logging`, and is raised again until it is on its way.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 2.0
_SOON_SECONDS = 0.02
_GRACE_SECONDS = 30.0


class _Interrupt:
    """The first signal that came, and what is done about it until the process ends."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.deadline = 0.0

    def first(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        if self.number is None:
            self.number, self.deadline = number, time.monotonic() + _GRACE_SECONDS
        self._raise(frame)

    def again(self, _number: int, frame: FrameType | None) -> None:
        """Handle the timer."""
        if time.monotonic() > self.deadline:
            self.leave()
        if not _on_its_way(sys.exc_info()[1]):
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        inside = _inside_logging(frame)
        signal.setitimer(signal.ITIMER_REAL, _SOON_SECONDS if inside else _AGAIN_SECONDS, _AGAIN_SECONDS)
        if not inside:
            raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(self.code)

    def unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Keep quiet about our own exception where Python drops it; it will be raised again."""
        if self.number is None or not isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
            sys.__unraisablehook__(lost)

    @property
    def code(self) -> int:
        """The exit code of a process that a signal ended."""
        return 128 + (self.number or 0)

    def leave(self) -> None:
        """End the process now: a thread that hangs must not keep it."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block by an exception: KeyboardInterrupt, and SystemExit(143)."""
    interrupt = _Interrupt()
    sys.unraisablehook = interrupt.unraisable
    signal.signal(signal.SIGALRM, interrupt.again)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt.first)
    try:
        yield
    finally:
        if interrupt.number is not None:
            interrupt.leave()


def _inside_logging(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


def _on_its_way(error: BaseException | None) -> bool:
    """Whether clean-up is running because of an interrupt: it is what is being handled, or led to it."""
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return True
        error = error.__context__
    return False
