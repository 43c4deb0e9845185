"""Turns errors, Ctrl-C and SIGTERM into one line on standard error and an exit code."""

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

from salun_core.cli.output import MODE, progress
from salun_core.errors import SalunError, escaped

INTERRUPTED = 130  # the shell's exit code after Ctrl-C
_AGAIN_SECONDS = 2.0  # time for the exception to reach a handler before it is raised again
_SOON_SECONDS = 0.02
_GRACE_SECONDS = 30.0  # time for the clean-up before the process ends anyway
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Interrupt:
    """Raises the first signal as an exception, and raises it again until it takes effect.

    Python drops an exception that is raised inside a destructor or a callback, so one exception is not enough: a
    timer raises it again. There are two exceptions to that: while clean-up is running because of the interrupt, and
    inside `logging`, whose locks would stay held. If clean-up or a thread hangs, the process ends after 30 seconds.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deadline = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        if self.number is None:
            self.number, self.deadline = number, time.monotonic() + _GRACE_SECONDS
        self._raise(frame)

    def on_timer(self, _number: int, frame: FrameType | None) -> None:
        """Handle SIGALRM."""
        if time.monotonic() > self.deadline:
            self.leave()
        if not _cleaning_up():
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        inside = _inside_logging(frame)
        signal.setitimer(signal.ITIMER_REAL, _SOON_SECONDS if inside else _AGAIN_SECONDS, _AGAIN_SECONDS)
        if not inside:
            raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(self.code)

    def on_unraisable(self, dropped: sys.UnraisableHookArgs) -> None:
        """Do not report our own exception when Python drops it: the timer raises it again."""
        if self.number is None or not isinstance(dropped.exc_value, (KeyboardInterrupt, SystemExit)):
            sys.__unraisablehook__(dropped)

    @property
    def code(self) -> int:
        """The exit code of a process that a signal ended."""
        return 128 + (self.number or 0)

    def leave(self) -> None:
        """End the process now, without waiting for threads."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


def _inside_logging(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


def _cleaning_up() -> bool:
    """Whether an interrupt is being handled, or led to the exception that is."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return True
        error = error.__context__
    return False


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block by an exception: KeyboardInterrupt or SystemExit(143)."""
    interrupt = _Interrupt()
    sys.unraisablehook = interrupt.on_unraisable
    signal.signal(signal.SIGALRM, interrupt.on_timer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt.on_signal)
    try:
        yield
    finally:
        if interrupt.number is not None:
            interrupt.leave()


@contextmanager
def reported() -> Iterator[None]:
    """Report an exception of the block in one line, and exit with its code; `--debug` adds the traceback.

    Exit codes 1, 2, 3, 4 or 5; 130 after Ctrl-C.
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
        if error.errno == errno.EPIPE:  # the reader of our output has gone; typer ends quietly
            raise
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in _DISK_FULL
        remedy = "free some space, or choose another place" if full else "check the path and its permissions"
        what = SalunError("cannot read or write a file", f"{place}{error.strerror or error}", remedy)
        raise _exit(error, str(what), 1) from error
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error: typer reports it with the usage line
            vars(error)["message"] = escaped(str(getattr(error, "message", "")))
            raise
        why = f"internal error ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise _exit(error, f"{why}. To fix it: run with --debug and report the traceback.", 1) from error


def _exit(error: BaseException, text: str, code: int) -> typer.Exit:
    if MODE.debug:
        from salun_core.telemetry.logs import redact_text

        progress(redact_text("".join(traceback.format_exception(error)).rstrip()))
    progress(f"Error: {text}")
    return typer.Exit(code)
