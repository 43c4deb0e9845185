"""Configuration of the unlearning loop; each method provides its own defaults."""

from __future__ import annotations

import math
import os
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from salun_core.config import Document
from salun_core.errors import UsageError
from salun_core.methods.offload import Place

Sharding = Literal["none", "fsdp"]
"""What several processes hold of a model in training: all weights each, or a slice each."""


class LoopConfig(Document):
    """How the loop runs: the base of every configuration."""

    epochs: int = Field(default=5, ge=1, description="stretches of the run; the state is kept after each")
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
    batch_norm: Literal["freeze", "update"] = Field(
        default="freeze", description="running statistics of batch-norm layers"
    )
    gradient_clip: float | None = Field(default=None, gt=0, description="largest norm of the whole gradient")
    precision: Literal["float32", "bf16", "auto"] = Field(
        default="float32", description="of forward and backward passes; auto: bf16 on a GPU, float32 elsewhere"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    sharding: Sharding = Field(
        default="none",
        description="several processes: `fsdp` divides weights, gradients and optimiser state among them (FSDP2), for "
        "models that do not fit one device; `none` gives each process all of them",
    )
    seed: int = Field(default=0, ge=0, lt=2**53, description="of all that is drawn at random")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    @property
    def scoring_passes(self) -> int:
        """Number of passes over the forget set for the saliency scores."""
        return 1

    @property
    def state_place(self) -> Place:
        """Where the state of the optimiser is between its steps."""
        return "none"

    def rate_at(self, progress: float) -> float:
        """Return the learning rate at a progress from 0 to 1."""
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "step":
            return float(self.learning_rate * 0.1 ** sum(progress >= milestone for milestone in self.milestones))
        return self.learning_rate


class UnlearnConfig(LoopConfig):
    """What every classifier method can set. A method with settings of its own extends it in its own file."""

    epochs: int = Field(default=5, ge=1, description="passes over the parts that the method trains on")
    augment: bool = Field(default=True, description="as the data spec says")
    forget_parts: int = Field(
        default=1,
        ge=1,
        le=100,
        description="RUM: parts of D_f, by memorisation, that are forgotten one after the other with `epochs` each",
    )
    seed: int = Field(default=0, ge=0, lt=2**53, description="of order, augmentation and random labels")

    @property
    def drawn_share(self) -> float:
        """Share of D_r that an epoch trains on."""
        return 1.0


class DrawingConfig(UnlearnConfig):
    """Settings of a method that can train on a draw from D_r in each epoch."""

    retain_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of D_r that an epoch trains on, drawn afresh for each epoch; only what is drawn is decoded",
    )

    @property
    def drawn_share(self) -> float:
        """Share of D_r that an epoch trains on."""
        return self.retain_fraction


def pick_device(name: str) -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:N` to an available device; `UsageError` if it is not available.

    If torchrun started several processes on a machine, `auto` and `cuda` give each its own GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} is not available", str(error).split("\n")[0], "use auto, cpu or cuda"
        ) from error
    return device
