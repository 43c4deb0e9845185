"""The training loop: epochs of phases, resumable after each epoch with bit-identical results."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from salun_core.device_memory import fitting
from salun_core.errors import DivergedError
from salun_core.evaluation.evidence import EpochRecord, Reading
from salun_core.methods.checkpoint import CheckpointStore, restore, snapshot
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.offload import offloaded
from salun_core.methods.sharded import is_sharded, whole
from salun_core.saliency import SaliencyMask, masked_optimizer
from salun_core.saliency.masked_step import own
from salun_core.telemetry.progress import report


@dataclass(frozen=True)
class Step:
    """This process's part of one step of the loop.

    Args:
        loss: model -> mean loss over this process's samples, a scalar.
        samples: number of samples of this process.
        weight: share of these samples in the step's batch.
        halves: returns two steps whose weighted losses add up to this one's, or this step alone if it has one sample;
            None if its loss is not a sum over samples.
    """

    loss: Callable[[nn.Module], Tensor]
    samples: int
    weight: float
    halves: Callable[[], Sequence[Step]] | None = None

    def parts(self, number: int) -> Sequence[Step]:
        """Return this step in at least so many parts, as far as it can be divided."""
        parts: list[Step] = [self]
        while len(parts) < number:
            divided = [half for part in parts for half in (part.halves() if part.halves else (part,))]
            if len(divided) == len(parts):
                break
            parts = divided
        return parts


@dataclass(frozen=True)
class Phase:
    """A part of an epoch, such as one pass over the retain set.

    Args:
        name: key of its loss in the history.
        device: device of its tensors.
        samples: number of samples of all steps, over all processes.
        steps: number of steps.
        draw: (generator of the epoch, process group) -> its steps. All randomness comes from the generator.
    """

    name: str
    device: torch.device
    samples: int
    steps: int
    draw: Callable[[torch.Generator, ProcessGroup], Iterator[Step]]


PhasesOfEpoch = Callable[[int, torch.Generator], Sequence[Phase]]
"""(epoch from 0, generator of the epoch) -> its phases."""

OnEpoch = Callable[[EpochRecord], None]


class Steering(Protocol):
    """Decides while a run is going on how many epochs it has, at which rate, and which of them count."""

    @property
    def ended(self) -> bool:
        """Whether the last epoch was run."""
        ...

    @property
    def batch_norm(self) -> str:
        """`freeze` or `update`, for the next epoch."""
        ...

    def rate_at(self, progress: float) -> float:
        """Return the learning rate at a progress of the next epoch from 0 to 1."""
        ...

    def judge(self, model: nn.Module, finite: bool) -> Reading:
        """Measure the model after an epoch; if the reading is not kept, the loop undoes the epoch."""
        ...


Steered = Callable[[Sequence[EpochRecord]], Steering]
"""(records before a resume) -> the steering of a run. It may look at the model, which has the state of the last one."""


@dataclass
class _Loop:
    """What all steps of a run share.

    Args:
        fits: batch size that the device has room for at once; it falls, and never rises again.
        parts: largest number of parts that a batch was divided into.
        steering: sets the rate of each epoch; None follows the configuration.
    """

    model: nn.Module
    optimizer: Optimizer
    config: LoopConfig
    group: ProcessGroup
    fits: int
    parts: int = 1
    steering: Steering | None = None

    @cached_property
    def sharded(self) -> bool:
        """Whether the processes hold slices of the weights instead of all of them."""
        return is_sharded(self.model)

    def rate_at(self, epoch: int, progress: float) -> float:
        """Return the learning rate at a progress of an epoch from 0 to 1."""
        if self.steering:
            return self.steering.rate_at(progress)
        return self.config.rate_at((epoch + progress) / self.config.epochs)

    def ended(self, epochs: int) -> bool:
        """Return whether a run has ended after so many epochs."""
        return self.steering.ended if self.steering else epochs >= self.config.epochs


def run_loop(
    model: nn.Module,
    phases_of_epoch: PhasesOfEpoch,
    config: LoopConfig,
    mask: SaliencyMask | None = None,
    checkpoint: CheckpointStore | None = None,
    fingerprint: str = "",
    on_epoch: OnEpoch | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    steered: Steered | None = None,
) -> list[EpochRecord]:
    """Train a model in place, and return one record per epoch, including those before a resume.

    All randomness of an epoch comes from generators seeded by (seed, epoch), so a resumed run needs no random state. If
    the loss or a weight becomes NaN or infinite (`DivergedError`), the last good checkpoint is kept. Weights outside
    the `mask` stay bit-identical. The `fingerprint` identifies the run; a checkpoint of another one is a
    `ConflictError`.

    If the device has no room for a batch, its gradient is added up from halves of it, then from quarters, and so on:
    the same steps with other last bits, as with several processes. With `batch_norm: update`, each part is normalised
    by its own statistics, and an attempt that failed has updated the running ones too. The records of the epochs have
    the number of parts.

    `steered` replaces `epochs` and `schedule` of the configuration. An epoch that is not kept, or that diverges, is
    undone before the checkpoint is written: model and optimiser have the state of the last kept one, and the record of
    the epoch stays. So a run that is killed before the checkpoint repeats the epoch, and one that is killed after it
    goes on from the restored state.
    """
    optimizer = _optimizer(model, config)
    if mask is not None:
        optimizer = masked_optimizer(optimizer, model, mask)
    optimizer = offloaded(optimizer, config.state_place)
    history = restore(checkpoint, fingerprint, model, optimizer) if checkpoint else []
    loop = _Loop(model, optimizer, config, group, config.batch_size)
    loop.steering = steered(history) if steered else None
    report("training", 0, 1)
    while not loop.ended(len(history)):
        record = _steered_epoch(loop, phases_of_epoch, len(history))
        history.append(record)
        if checkpoint:
            kept = group.main or not loop.sharded
            checkpoint.save(snapshot(fingerprint, model, optimizer, history, kept))
        if on_epoch:
            on_epoch(record)
    report("training", 1, 1)
    optimizer.zero_grad()  # gradients take as much memory as the weights, and nobody reads the last ones
    model.eval()
    return history


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the CPU generator of one epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def set_training_mode(model: nn.Module, batch_norm: str) -> None:
    """Put a model into train mode; with `freeze`, batch-norm layers keep their running statistics and use them."""
    model.train()
    if batch_norm == "freeze":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _optimizer(model: nn.Module, config: LoopConfig) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    kind = Adam if config.optimizer == "adam" else AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _require_finite(model: nn.Module, epoch: int, group: ProcessGroup) -> None:
    """Check that weights are finite: losses are computed before each step and do not cover the last step."""
    finite = all(bool(torch.isfinite(own(parameter)).all()) for parameter in model.parameters())
    if group.largest(int(not finite)):  # a slice of sharded weights is known to one process
        raise DivergedError(
            "a weight is not finite",
            f"after epoch {epoch + 1}",
            "lower the learning rate; the checkpoint of the last whole epoch is kept",
        )


def _whole_epoch(loop: _Loop, phases_of_epoch: PhasesOfEpoch, epoch: int) -> EpochRecord:
    """Run an epoch up to the point where all processes hold its finite weights."""
    record = _run_epoch(loop, phases_of_epoch, epoch)
    _require_finite(loop.model, epoch, loop.group)
    loop.group.synchronise(loop.model)
    return record


def _steered_epoch(loop: _Loop, phases_of_epoch: PhasesOfEpoch, epoch: int) -> EpochRecord:
    """Run an epoch; if it is steered, measure it, and undo it unless it is kept."""
    if loop.steering is None:
        return _whole_epoch(loop, phases_of_epoch, epoch)
    started = time.perf_counter()
    good = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict()))
    rate = loop.steering.rate_at(0.0)
    try:
        record = _whole_epoch(loop, phases_of_epoch, epoch)
    except DivergedError:  # of all processes: losses are summed, weights are the same
        record = EpochRecord(epoch=epoch + 1, learning_rate=rate, losses={}, seconds=0.0)
    reading = loop.steering.judge(loop.model, finite=bool(record.losses))
    if not reading.kept:
        loop.model.load_state_dict(good[0])
        loop.optimizer.load_state_dict(good[1])
    seconds = time.perf_counter() - started
    return record.model_copy(update={"reading": reading, "learning_rate": rate, "seconds": seconds})


def _run_epoch(loop: _Loop, phases_of_epoch: PhasesOfEpoch, epoch: int) -> EpochRecord:
    started, config = time.perf_counter(), loop.config
    generator = epoch_generator(config.seed, epoch)
    losses: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((generator.initial_seed() + loop.group.rank) % 2**63)  # for layers such as dropout
        set_training_mode(loop.model, loop.steering.batch_norm if loop.steering else config.batch_norm)
        phases = [phase for phase in phases_of_epoch(epoch, generator) if phase.samples]
        steps = sum(phase.steps for phase in phases)
        done = 0
        for phase in phases:
            losses[phase.name] = _run_phase(loop, phase, generator, (epoch, done, steps))
            done += phase.steps
            if not math.isfinite(losses[phase.name]):
                raise DivergedError(
                    f"loss of the {phase.name} phase is not finite",
                    f"in epoch {epoch + 1} of {config.epochs}",
                    "lower the learning rate; the checkpoint of the last whole epoch is kept",
                )
    return EpochRecord(
        epoch=epoch + 1,
        learning_rate=loop.rate_at(epoch, 0.0),
        losses=losses,
        seconds=time.perf_counter() - started,
        parts=loop.group.largest(loop.parts),
    )


def _run_phase(loop: _Loop, phase: Phase, generator: torch.Generator, position: tuple[int, int, int]) -> float:
    """Train on one phase and return its mean loss; `position` is (epoch, steps done in it, steps of the epoch)."""
    (epoch, done, steps), config = position, loop.config
    total = torch.zeros((), device=phase.device)
    for taken, step in enumerate(phase.draw(generator, loop.group), start=done):
        for parameters in loop.optimizer.param_groups:
            parameters["lr"] = loop.rate_at(epoch, taken / steps)
        total += _set_gradient(loop, step, phase.device)
        loop.group.add_gradients(loop.model)
        if config.gradient_clip is not None:
            _clip(loop, config.gradient_clip)
        loop.optimizer.step()
        if loop.steering is None:
            note = f"epoch {epoch + 1} of {config.epochs}"
            report("training", epoch * steps + taken + 1, config.epochs * steps, note)
        else:
            report("training", taken + 1, steps, f"round {epoch + 1}")
    return float(loop.group.total(total)) / phase.samples


def _set_gradient(loop: _Loop, step: Step, device: torch.device) -> Tensor:
    """Compute the gradient of a step's weighted loss, in parts if needed, and return the sum of its samples' losses.

    It ends before any exchange with the other processes, which have room of their own.
    """
    size = loop.config.batch_size

    def attempt(fits: int) -> Tensor:
        loop.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        parts = step.parts(size // fits)
        for part in parts:
            with _autocast(loop.config, device):
                loss = part.loss(loop.model)
            (loss * part.weight if part.weight != 1 else loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * part.samples
        loop.parts = max(loop.parts, len(parts))
        return total

    if step.halves is None or loop.sharded:  # all processes must run the same passes
        return fitting(attempt, size, least=size)[0]
    total, loop.fits = fitting(attempt, loop.fits)
    return total


def _clip(loop: _Loop, largest: float) -> None:
    if not loop.sharded:
        nn.utils.clip_grad_norm_(loop.model.parameters(), largest)
        return
    parameters = [parameter for parameter in loop.model.parameters() if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def _autocast(config: LoopConfig, device: torch.device) -> AbstractContextManager[object]:
    if config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
