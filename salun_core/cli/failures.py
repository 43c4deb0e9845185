"""Turns what a verb raises into one line on standard error and an exit code."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from salun_core.cli.output import MODE, say
from salun_core.errors import SalunError

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
