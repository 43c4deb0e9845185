"""Reports how far long work is. The command line shows it on a terminal; without somebody to show it, nothing happens.

A context variable passes it on, because the loops of training, scoring and drawing are far below the command, and a
parameter would go through every step, task and method on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Show = Callable[[str, int, int, str], None]
"""(name of the work, parts done, parts in all, note) -> None."""

T = TypeVar("T")
_SHOW: ContextVar[Show | None] = ContextVar("salun_progress", default=None)


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Report the progress of the block to a function."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def report(work: str, done: int, total: int, note: str = "") -> None:
    """Report how far a work, such as `images`, is; it has ended when all parts are done.

    `note` is what else is known, such as the loss.
    """
    show = _SHOW.get()
    if show is not None:
        show(work, done, total, note)


def tracked(parts: Iterable[T], work: str, total: int) -> Iterator[T]:
    """Yield the parts of a work and report each one that is done; a work that is given up has ended, too."""
    report(work, 0, total)
    try:
        for done, part in enumerate(parts, start=1):
            yield part
            report(work, min(done, total), total)
    finally:
        report(work, total, total)
