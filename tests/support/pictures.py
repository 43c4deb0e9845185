"""Leaves out the pictures of reports in tests that do not look at them: to draw takes longer than all else in a run.

`tests/conftest.py` imports this module before any other can bind `draw`, and so does the process that others are forked
from. A new interpreter, such as those that run the demo's pipeline, draws them. The picture of a suite is always drawn:
there is one per suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from salun_core.report import plots

_draw = plots.draw
_wanted = True


def _if_wanted(name: str, width: float, height: float, paint: Callable[[Any], str]) -> str:
    of_report = paint.__module__ == plots.__name__
    return _draw(name, width, height, paint) if _wanted or not of_report else '<svg role="img"></svg>'


plots.draw = _if_wanted


@contextmanager
def left_out() -> Iterator[None]:
    """Draw no picture of a report meanwhile."""
    with _set(wanted=False):
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Draw all pictures meanwhile, also inside `left_out`."""
    with _set(wanted=True):
        yield


@contextmanager
def _set(*, wanted: bool) -> Iterator[None]:
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before
