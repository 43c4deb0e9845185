"""What a search tried: JSON, `salun.tuning/v1`, beside the model that it made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from salun_core.config import Document


class TrialRecord(Document):
    """One setting that was tried."""

    number: int = Field(ge=0, description="from 0, in the order they were tried")
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
    passes: int = Field(ge=0, description="sample passes of the trial, its measurements included")
    seconds: float = Field(ge=0, description="wall clock")


class TuningLog(Document):
    """All that a search tried, and what it chose."""

    format: Literal["salun.tuning/v1"] = "salun.tuning/v1"
    method: str
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
