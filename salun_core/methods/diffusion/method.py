"""The interface of a diffusion model's unlearning method: a loss per step, stages, or a closed-form edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from salun_core.diffusion.conditions import ConditionTable, EncodedTable, TextEncoder
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised, endless, noised
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods import method
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import OnEpoch, Phase, Step

C = TypeVar("C", bound=DiffusionConfig)
C_co = TypeVar("C_co", bound=DiffusionConfig, covariant=True)


@dataclass(frozen=True)
class ExampleSets:
    """Examples to forget and to retain.

    Args:
        forget: D_f with conditions c, and c' in `pseudo`.
        retain: D_r with its conditions.
        table: table of all conditions.
        pixels: whether the examples are pixels instead of latents.
        encoder: the text encoder of the table's rows, for `selection: text` only; training changes a copy.
    """

    forget: Examples
    retain: Examples
    table: ConditionTable
    pixels: bool
    encoder: TextEncoder | None = None

    def to(self, device: torch.device) -> ExampleSets:
        """Return the sets with their tensors on a device."""
        moved = self.forget.to(device), self.retain.to(device), self.table.to(device)
        return ExampleSets(*moved, self.pixels, self.encoder.to(device) if self.encoder else None)


@dataclass(frozen=True)
class DiffusionContext(Generic[C_co]):
    """Inputs of a loss, shared by all steps.

    Args:
        denoiser: the denoiser in training; it is fixed if the text encoder is trained.
        original: θ_o, frozen; set only for methods that need it.
        sets: examples and conditions.
        config: configuration of the method.
        generator: CPU generator of this epoch, for the method's own random numbers.
        text: the text encoder in training; None if the denoiser is trained.
    """

    denoiser: Denoiser
    original: Denoiser | None
    sets: ExampleSets
    config: C_co
    generator: torch.Generator
    text: TextEncoder | None = None

    @property
    def table(self) -> ConditionTable:
        """The conditions of the model in training; those of the original are in the sets."""
        table = self.sets.table
        if self.text is None:
            return table
        return EncodedTable(table.names, table.rows, table.null, table.tokens, encoder=self.text)

    def of(self, model: nn.Module) -> DiffusionContext[C_co]:
        """Return the context with another network in training: of the denoiser, or of the text encoder."""
        if self.text is None:
            return replace(self, denoiser=self.denoiser.of(model))
        return replace(self, text=replace(self.text, network=model))


StepLoss = Callable[[DiffusionContext[Any], Noised, Noised], Tensor]
"""(context, forget batch, retain batch) -> scalar to descend."""

Loop = Callable[[DiffusionContext[Any], StepLoss, CheckpointStore | None, str, OnEpoch | None], list[EpochRecord]]
"""(context, loss, checkpoint, fingerprint, callback) -> records of all epochs; trains the context's network."""


@dataclass(frozen=True)
class Training:
    """What a method that trains in stages runs them with.

    Args:
        loop: one training with all steps of the configuration.
    """

    loop: Loop
    checkpoint: CheckpointStore | None
    fingerprint: str
    on_epoch: OnEpoch | None
    group: ProcessGroup


@dataclass(frozen=True)
class DiffusionMethod(method.Method[C]):
    """One row of `METHODS`.

    Args:
        loss: loss of one step, for a method that trains once.
        edit: closed-form edit of the denoiser's weights, in place.
        stages: trains the context's network in place, in several loops, and returns the records of all epochs.
        needs_forget: whether each step reads forget examples; False saves the work.
        needs_retain: whether each step reads retain examples.
        passes: cost of a run in passes (one example forward and backward); a forward pass alone counts 1/3. By default
            each example of each batch counts once.
        trains_text: whether it can train the text encoder instead of the denoiser (`selection: text`).
    """

    base_config = DiffusionConfig
    loss: Callable[[DiffusionContext[C], Noised, Noised], Tensor] | None = None
    edit: Callable[[Denoiser, ExampleSets, C], None] | None = None
    stages: Callable[[DiffusionContext[C], Training], list[EpochRecord]] | None = None
    needs_forget: bool = True
    needs_retain: bool = True
    passes: Callable[[C], float] | None = None
    trains_text: bool = False
    config_type: type[C] = field(default=DiffusionConfig, kw_only=True)  # type: ignore[assignment]

    @property
    def ways(self) -> tuple[object, ...]:
        """The loss of a training, a closed-form edit, or the stages of several trainings."""
        return self.loss, self.edit, self.stages

    def check(self, name: str, config: C) -> None:
        """Reject α = 0 for a method with both losses, unless it is forced, and `selection: text` for most methods.

        Raises:
            UsageError: α is 0; without a retain loss, training destroys every class. Or the method trains denoisers
                only.
        """
        if config.selection == "text" and not self.trains_text:
            raise UsageError(
                f"{name} does not train the text encoder",
                "its loss and its mask are of the denoiser",
                "choose another selection, or the method adv_unlearn",
            )
        if self.needs_forget and self.needs_retain and config.alpha <= 0 and not config.allow_zero_alpha:
            raise UsageError(
                "alpha 0 is refused",
                "without a retain loss every class is destroyed",
                "give an alpha above 0, or set allow_zero_alpha: true",
            )

    def cost(self, config: C) -> int:
        """Return the cost of a run in passes, rounded up. A closed-form edit costs none."""
        if self.edit:
            return 0
        trained = config.steps * config.batch_size * (self.needs_forget + self.needs_retain)
        repeated = trained / 3 if config.gradient_checkpointing else 0
        return math.ceil((self.passes(config) if self.passes else trained) + repeated)


def denoising_phase(row: DiffusionMethod[Any], context: DiffusionContext[Any]) -> Phase:
    """Return the steps of one epoch of a method; each has its own forget batch and retain batch."""
    sets, config, process = context.sets, context.config, context.denoiser.process
    size, count, device = config.batch_size, config.steps // config.epochs, sets.retain.mean.device
    loss = row.loss
    assert loss is not None

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        """Yield the steps; every process draws the same batches and takes its own share of each."""
        if size % group.size:
            raise UsageError(f"a batch of {size} cannot be shared by {group.size} processes", "", "choose a multiple")
        forget = endless(len(sets.forget), size, generator)
        retain = endless(len(sets.retain), size, generator)
        mine = torch.arange(size).chunk(group.size)[group.rank].to(device)
        for _ in range(count):
            forgotten = noised(sets.forget.select(next(forget)), process, generator) if row.needs_forget else _EMPTY
            kept = noised(sets.retain.select(next(retain)), process, generator) if row.needs_retain else _EMPTY
            kept = _with_null_condition(kept, context, generator)
            forgotten, kept = (batch.select(mine) if len(batch) else batch for batch in (forgotten, kept))
            yield _step(loss, replace(context, generator=generator), forgotten, kept, 1 / group.size)

    return Phase("denoising", device, count * size, count, draw)


def _step(loss: StepLoss, context: DiffusionContext[Any], forget: Noised, retain: Noised, weight: float) -> Step:
    samples = max(len(forget), len(retain))  # equal, unless the method reads one of them only

    def halves() -> Sequence[Step]:
        if samples < 2:
            return [step]
        made = []
        for index in torch.arange(samples, device=context.sets.retain.mean.device).chunk(2):
            half_f, half_r = (batch.select(index) if len(batch) else batch for batch in (forget, retain))
            made.append(_step(loss, context, half_f, half_r, weight * len(index) / samples))
        return made

    step = Step(partial(_loss_of, loss, context, forget, retain), samples, weight, halves)
    return step


def _loss_of(
    loss: StepLoss, context: DiffusionContext[Any], forget: Noised, retain: Noised, model: nn.Module
) -> Tensor:
    return loss(context.of(model), forget, retain)


def _with_null_condition(batch: Noised, context: DiffusionContext[Any], generator: torch.Generator) -> Noised:
    """Give a share of the retain examples the null condition, as training for classifier-free guidance does."""
    share, null = context.config.null_share, context.sets.table.null
    if not share or null is None or not len(batch):
        return batch
    chosen = (torch.rand(len(batch), generator=generator) < share).to(batch.condition.device)
    return replace(batch, condition=batch.condition.masked_fill(chosen, null))


_NONE = torch.empty(0)
_EMPTY = Noised(_NONE, torch.empty(0, dtype=torch.int64), _NONE, torch.empty(0, dtype=torch.int64))
