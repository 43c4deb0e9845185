"""Leaves out the pictures of reports in tests that do not look at them: to draw takes longer than all else in a run.

`tests/conftest.py` imports this module before any other can bind `draw`. A command that a test starts as a process,
such as the demo or those of the tutorials, draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from salun_core.report import plots

_draw = plots.draw
_wanted = True


def _if_wanted(name: str, width: float, height: float, paint: Callable[[Any], str]) -> str:
    return _draw(name, width, height, paint) if _wanted else '<svg role="img"></svg>'


plots.draw = _if_wanted


@contextmanager
def left_out() -> Iterator[None]:
    """Draw no picture meanwhile."""
    global _wanted
    _wanted = False
    try:
        yield
    finally:
        _wanted = True
