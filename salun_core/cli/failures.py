"""Errors, Ctrl-C and SIGTERM: one line on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from salun_core.cli.output import MODE, say
from salun_core.errors import SalunError

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


INTERRUPTED = 130
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def reported() -> Iterator[None]:
    """Report what the block raises; `--debug` adds the traceback.

    Raises:
        typer.Exit: with the exit code of the error: 1, 2, 3, 4 or 5; 130 after Ctrl-C.
    """
    try:
        yield
    except SalunError as error:
        raise _exit(error, str(error), error.exit_code) from error
    except KeyboardInterrupt as error:
        raise _exit(error, "interrupted", INTERRUPTED) from error
    except (typer.Exit, typer.Abort):
        raise
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read our output has gone; typer ends quietly
            raise
        raise _exit(error, str(_of_system(error)), 1) from error
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error, that typer reports with the usage line
            raise
        why = f"internal error ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise _exit(error, f"{why}. To fix it: run with --debug and report the traceback.", 1) from error


def _of_system(error: OSError) -> SalunError:
    place = f"{error.filename}: " if error.filename else ""
    remedy = (
        "free some space, or choose another place" if error.errno in _FULL else "check the path and its permissions"
    )
    return SalunError("cannot read or write a file", f"{place}{error.strerror or error}", remedy)


def _exit(error: BaseException, text: str, code: int) -> typer.Exit:
    if MODE.debug:
        say("".join(traceback.format_exception(error)).rstrip())
    say(f"Error: {text}")
    return typer.Exit(code)
