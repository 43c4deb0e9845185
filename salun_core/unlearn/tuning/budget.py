"""What a search may spend: passes, seconds, or epochs over all training images."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from salun_core.errors import UsageError

DEFAULT_BUDGET = "20e"
_FORM = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|e|)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """The most that a search may spend; it counts from when it is made.

    Args:
        text: as it was given.
        passes: images forward and backward; None where seconds bound the search.
        seconds: wall clock; None where passes do.
    """

    text: str
    passes: int | None = None
    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)

    def allows(self, passes: int) -> bool:
        """Say whether so many passes in all may be spent; a limit of seconds asks the clock alone."""
        if self.passes is not None:
            return passes <= self.passes
        return self.seconds is not None and time.perf_counter() - self.started < self.seconds


def parse_budget(text: str, images: int) -> Budget:
    """Read a budget.

    Args:
        text: `200000` passes; `90s`, `15m` or `2h` of wall clock; or `20e`, twenty times all training images.
        images: in D_f and D_r together.

    Returns:
        The budget. Only one in passes or epochs finds the same settings on every machine.

    Raises:
        UsageError: it has another form, or is zero.
    """
    match = _FORM.fullmatch(text.strip())
    amount = float(match[1]) if match else 0.0
    if match is None or amount <= 0:
        raise UsageError(
            f"{text!r} is no budget", "it is a number of passes, or ends in s, m, h or e", "give 200000, 90s or 20e"
        )
    unit = match[2]
    if unit in _SECONDS:
        return Budget(text.strip(), seconds=amount * _SECONDS[unit])
    return Budget(text.strip(), passes=int(amount * images) if unit == "e" else int(amount))
