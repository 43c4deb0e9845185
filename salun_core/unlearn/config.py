"""Configuration of the unlearning loop; each method brings its own defaults."""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
from pydantic import Field, model_validator

from salun_core.config import Document
from salun_core.errors import UsageError


class UnlearnConfig(Document):
    """How the loop runs. The fields are the same for every method; their defaults are the method's."""

    epochs: int = Field(default=5, ge=1, description="passes over the parts that the method trains on")
    learning_rate: float = Field(default=0.003, gt=0, le=1e6, description="of the first step")
    schedule: Literal["constant", "cosine", "step"] = Field(default="constant", description="of the learning rate")
    milestones: list[float] = Field(
        default=[0.5, 0.75], description="`step`: shares of the run at which the rate falls by 10"
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="torch's own")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd")
    nesterov: bool = Field(default=False, description="sgd")
    weight_decay: float = Field(
        default=5e-4, ge=0, allow_inf_nan=False, description="acts on salient weights only where there is a mask"
    )
    batch_size: int = Field(default=64, ge=1, description="samples a step")
    order: Literal["sequential", "mixed"] = Field(
        default="sequential",
        description="each epoch all of the forget set, then all of the retain set; or both shuffled together",
    )
    batch_norm: Literal["freeze", "update"] = Field(
        default="freeze", description="running statistics of batch-norm layers"
    )
    augment: bool = Field(default=True, description="as the data spec says")
    gradient_clip: float | None = Field(default=None, gt=0, description="largest norm of the whole gradient")
    precision: Literal["float32", "bf16"] = Field(default="float32", description="of forward and backward passes")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    seed: int = Field(default=0, ge=0, lt=2**53, description="of order, augmentation and random labels")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> UnlearnConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def rate_at(self, progress: float) -> float:
        """Return the learning rate at a share of the run from 0 to 1."""
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "step":
            return float(self.learning_rate * 0.1 ** sum(progress >= milestone for milestone in self.milestones))
        return self.learning_rate


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that is there.

    Where torchrun has started several processes on a machine, `auto` and `cuda` give each its own GPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"there is no device {name!r}", str(error).split("\n")[0], "use auto, cpu or cuda") from error
    return device
