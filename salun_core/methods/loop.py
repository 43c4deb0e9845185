"""The one training loop: epochs of parts, resumable after each epoch, the same bits after a kill and a resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from salun_core.errors import ModelError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import CheckpointStore, restore, snapshot
from salun_core.methods.classification.method import Stretch
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import ALONE, World
from salun_core.saliency import SaliencyMask, masked_optimizer

PartsOfEpoch = Callable[[torch.Generator], Sequence[Stretch]]
OnEpoch = Callable[[EpochRecord], None]


def run_loop(
    model: nn.Module,
    parts_of_epoch: PartsOfEpoch,
    config: LoopConfig,
    mask: SaliencyMask | None = None,
    checkpoint: CheckpointStore | None = None,
    fingerprint: str = "",
    on_epoch: OnEpoch | None = None,
    world: World = ALONE,
) -> list[EpochRecord]:
    """Train a model in place.

    All randomness of an epoch comes from generators seeded by (seed, epoch), so a resumed run needs no random state.

    Args:
        model: on the device that the parts' images are on.
        parts_of_epoch: gives the parts of an epoch from its own generator.
        config: rates, optimiser, batch norm.
        mask: weights outside it keep their bits.
        checkpoint: where to keep the state after each epoch, and to look for one at the start.
        fingerprint: names the run; a checkpoint of another run is refused.
        on_epoch: called after each epoch.
        world: this process, where several that have joined share the batches.

    Returns:
        One record an epoch, those before a resume included.

    Raises:
        ModelError: the loss or a weight became NaN or infinite; the last good checkpoint is kept.
        ConflictError: the checkpoint is of another run.
    """
    optimizer = _optimizer(model, config)
    if mask is not None:
        optimizer = masked_optimizer(optimizer, model, mask)
    history = restore(checkpoint, fingerprint, model, optimizer) if checkpoint else []
    for epoch in range(len(history), config.epochs):
        record = _run_epoch(model, optimizer, parts_of_epoch, config, epoch, world)
        _require_finite(model, epoch)
        world.settle(model)
        history.append(record)
        if checkpoint:
            checkpoint.save(snapshot(fingerprint, model, optimizer, history))
        if on_epoch:
            on_epoch(record)
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


def _require_finite(model: nn.Module, epoch: int) -> None:
    """The last step of an epoch may spoil weights after its loss was taken: such an epoch must not be kept."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise ModelError(
            "a weight is not finite",
            f"after epoch {epoch + 1}",
            "lower the learning rate; the checkpoint of the last whole epoch is kept",
        )


def _run_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    parts_of_epoch: PartsOfEpoch,
    config: LoopConfig,
    epoch: int,
    world: World,
) -> EpochRecord:
    started = time.perf_counter()
    generator = epoch_generator(config.seed, epoch)
    losses: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((generator.initial_seed() + world.rank) % 2**63)  # for dropout and the like
        set_training_mode(model, config.batch_norm)
        parts = [part for part in parts_of_epoch(generator) if len(part)]
        steps = sum(part.steps(config.batch_size) for part in parts)
        done = 0
        for part in parts:
            losses[part.name], taken = _run_part(model, optimizer, part, config, generator, world, (epoch, done, steps))
            done += taken
            if not torch.isfinite(torch.tensor(losses[part.name])):
                raise ModelError(
                    f"loss of the {part.name} part is not finite",
                    f"in epoch {epoch + 1} of {config.epochs}",
                    "lower the learning rate; the checkpoint of the last whole epoch is kept",
                )
    return EpochRecord(
        epoch=epoch + 1,
        learning_rate=config.rate_at(epoch / config.epochs),
        losses=losses,
        seconds=time.perf_counter() - started,
    )


def _run_part(
    model: nn.Module,
    optimizer: Optimizer,
    part: Stretch,
    config: LoopConfig,
    generator: torch.Generator,
    world: World,
    position: tuple[int, int, int],
) -> tuple[float, int]:
    epoch, done, steps = position
    total, taken = torch.zeros((), device=part.device), 0
    for step in part.draw(config, generator, world):
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at((epoch + (done + taken) / steps) / config.epochs)
        with _autocast(config, part.device):
            loss = step.loss(model)
        optimizer.zero_grad()
        (loss * step.weight if step.weight != 1 else loss).backward()  # type: ignore[no-untyped-call]
        world.add_gradients(model)
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        total += loss.detach() * step.samples
        taken += 1
    return float(world.total(total)) / len(part), taken


def _autocast(config: LoopConfig, device: torch.device) -> AbstractContextManager[object]:
    if config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
