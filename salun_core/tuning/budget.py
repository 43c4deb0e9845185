"""The budget of a search and the record of its trials (`salun.tuning/v1`)."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from salun_core.config import Document
from salun_core.errors import UsageError
from salun_core.gate import Cause

_FORM = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|e|)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """The maximum cost of a search; the clock starts when the object is created.

    Args:
        text: as it was given.
        passes: images forward and backward; None if seconds limit the search.
        seconds: wall clock; None if passes limit the search.
    """

    text: str
    passes: int | None = None
    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)

    def allows(self, passes: int) -> bool:
        """Return whether so many passes may be spent in total; a limit of seconds depends on the clock only."""
        if self.passes is not None:
            return passes <= self.passes
        return self.seconds is not None and time.perf_counter() - self.started < self.seconds

    def used(self, passes: int) -> float:
        """Return the share of the budget that so many passes are; a limit of seconds depends on the clock only."""
        if self.passes is not None:
            return passes / self.passes
        assert self.seconds is not None
        return (time.perf_counter() - self.started) / self.seconds


def parse_budget(text: str, images: int) -> Budget:
    """Parse a budget: `200000` passes; `90s`, `15m` or `2h`; or `20e`, twenty epochs over the `images` of D_f and D_r.

    Only budgets in passes or epochs give the same settings on every machine.
    """
    match = _FORM.fullmatch(text.strip())
    amount = float(match[1]) if match else 0.0
    if match is None or amount <= 0:
        raise UsageError(
            f"{text!r} is not a budget",
            "it must be a number of passes, or end in s, m, h or e",
            "give 200000, 90s or 20e",
        )
    unit = match[2]
    if unit in _SECONDS:
        return Budget(text.strip(), seconds=amount * _SECONDS[unit])
    return Budget(text.strip(), passes=int(amount * images) if unit == "e" else int(amount))


class TrialRecord(Document):
    """One setting that was tried."""

    number: int = Field(ge=0, description="from 0, in the order they were begun")
    method: str = Field(description="the method that it tried")
    settings: dict[str, float | str] = Field(description="settings that were searched for, by name")
    density: float | None = Field(default=None, description="share of salient weights; null for a method without mask")
    epochs: int = Field(ge=0, description="of the best model of the trial; 0 where it made none")
    epochs_run: int = Field(ge=0, description="epochs that it ran")
    state: Literal["finished", "stopped", "failed"] = Field(
        description="stopped: by its own figures or the other trials'; failed: the loss or a weight was not a number"
    )
    figures: dict[str, float] = Field(default={}, description="of its best model, on held-out data in place of test")
    distance: float | None = Field(default=None, description="what the search makes small; 0 is indistinguishable")
    refused: list[str] = Field(default=[], description="rules of the policy that its best model broke")
    causes: list[Cause] = Field(default=[], description="why each of these rules failed")
    passes: int = Field(ge=0, description="sample passes of the trial, its measurements included")
    seconds: float = Field(ge=0, description="wall clock")


class TuningLog(Document):
    """All that a search tried, and what it chose."""

    format: Literal["salun.tuning/v1"] = "salun.tuning/v1"
    method: str = Field(description="as it was requested: one; several with commas; or auto, those of the portfolio")
    chosen_method: str | None = Field(default=None, description="of the chosen trial; null: refused")
    not_tried: list[str] = Field(default=[], description="methods that the budget did not suffice for")
    seed: int
    optimiser: str = Field(description="with its version: another may try other settings")
    budget: str = Field(description="as it was given")
    policy: str = Field(description="name of the policy whose margins bound the search")
    policy_digest: str
    not_judged: list[str] = Field(default=[], description="metrics of its rules that the search cannot measure")
    held_out: int = Field(ge=0, description="validation images that stood for unseen data")
    chosen: int | None = Field(default=None, description="number of the trial that was chosen; null: refused")
    trials: list[TrialRecord]
    passes: int = Field(ge=0, description="of all trials, and of the saliency scores")
    seconds: float = Field(ge=0, description="wall clock of the whole search")
