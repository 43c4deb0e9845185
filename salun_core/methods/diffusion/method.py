"""The interface of a diffusion method: a loss per step, or an edit in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised, endless, noised
from salun_core.errors import UsageError
from salun_core.methods.classification.method import Step
from salun_core.methods.config import LoopConfig
from salun_core.methods.diffusion.config import GenerationConfig
from salun_core.methods.distributed import World


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


@dataclass(frozen=True)
class DiffusionStretch:
    """So many steps of one method, each on a forget batch and a retain batch of its own.

    Args:
        method: whose loss.
        setting: denoiser, examples, configuration.
        count: of steps.
    """

    method: GenerationMethod
    setting: Setting
    count: int

    @property
    def name(self) -> str:
        """For the history."""
        return "denoising"

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.setting.task.retain.mean.device

    def __len__(self) -> int:
        return self.count * self.setting.config.batch_size

    def steps(self, batch_size: int) -> int:
        """Return the number of steps."""
        return self.count

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield the steps; every process draws the same batches and takes its own share of each.

        Raises:
            UsageError: the batch cannot be shared evenly.
        """
        size = config.batch_size
        if size % world.size:
            raise UsageError(f"a batch of {size} cannot be shared by {world.size} processes", "", "choose a multiple")
        task, method = self.setting.task, self.method
        setting = replace(self.setting, generator=generator)
        forget = endless(len(task.forget), size, generator)
        retain = endless(len(task.retain), size, generator)
        mine = torch.arange(size).chunk(world.size)[world.rank]
        for _ in range(self.count):
            batches = [
                self._noised(examples, next(order), generator) if needed else _EMPTY
                for examples, order, needed in (
                    (task.forget, forget, method.needs_forget),
                    (task.retain, retain, method.needs_retain),
                )
            ]
            shares = batches[0], self._told_less(batches[1], generator)
            ours, kept = (batch.select(mine.to(self.device)) if len(batch) else batch for batch in shares)
            yield Step(partial(self._loss, setting, ours, kept), len(mine), 1 / world.size)

    def _noised(self, examples: Examples, index: Tensor, generator: torch.Generator) -> Noised:
        return noised(examples.select(index), self.setting.denoiser.process, generator)

    def _told_less(self, batch: Noised, generator: torch.Generator) -> Noised:
        """Give a share of the retain examples the null condition, as a training with guidance in mind does."""
        share, null = self.setting.config.null_share, self.setting.task.table.null
        if not share or null is None or not len(batch):
            return batch
        chosen = (torch.rand(len(batch), generator=generator) < share).to(batch.condition.device)
        return replace(batch, condition=batch.condition.masked_fill(chosen, null))

    def _loss(self, setting: Setting, forget: Noised, retain: Noised, model: nn.Module) -> Tensor:
        assert self.method.loss is not None
        return self.method.loss(replace(setting, denoiser=setting.denoiser.of(model)), forget, retain)


_NONE = torch.empty(0)
_EMPTY = Noised(_NONE, torch.empty(0, dtype=torch.int64), _NONE, torch.empty(0, dtype=torch.int64))
