"""What a method for diffusion models is: a loss a step, or an edit in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.config import GenerationConfig
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised


@dataclass(frozen=True)
class Task:
    """What there is to forget and to keep.

    Args:
        forget: D_f with conditions c, and c' in `pseudo`.
        retain: D_r with its conditions.
        table: all conditions.
        pixels: whether the examples are pixels, not latents.
    """

    forget: Examples
    retain: Examples
    table: ConditionTable
    pixels: bool

    def to(self, device: torch.device) -> Task:
        """Return the task with its tensors on a device."""
        return Task(self.forget.to(device), self.retain.to(device), self.table.to(device), self.pixels)


@dataclass(frozen=True)
class Setting:
    """What a loss works with, the same at every step.

    Args:
        denoiser: the one in training.
        original: θ_o, frozen; only for methods that ask for it.
        task: examples and conditions.
        config: of the method.
        generator: a CPU generator of this epoch, for what the method itself draws.
    """

    denoiser: Denoiser
    original: Denoiser | None
    task: Task
    config: GenerationConfig
    generator: torch.Generator


StepLoss = Callable[[Setting, Noised, Noised], Tensor]
"""(setting, forget batch, retain batch) -> scalar to descend."""

Edit = Callable[[Denoiser, Task, GenerationConfig], None]
"""Changes the denoiser's weights in place, once."""


@dataclass(frozen=True)
class GenerationMethod:
    """One row of `METHODS`.

    Args:
        loss: of one step; None for a method in closed form.
        edit: in closed form; None for a method that trains.
        needs_mask: whether it trains salient weights only.
        needs_original: whether its loss asks the model before.
        needs_forget: whether each step reads forget examples; False spares the work.
        needs_retain: whether each step reads retain examples.
        fresh_start: whether it begins from fresh weights.
        defaults: configuration that differs from `GenerationConfig`'s defaults.
    """

    loss: StepLoss | None = None
    edit: Edit | None = None
    needs_mask: bool = False
    needs_original: bool = False
    needs_forget: bool = True
    needs_retain: bool = True
    fresh_start: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
