"""Unlearning methods on one resumable loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from salun_core.config import parse
from salun_core.data.images import ImageSet
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import DataError, UsageError, unknown_name
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import CheckpointStore, FileCheckpoint
from salun_core.methods.classification import (
    boundary_expanding,
    boundary_shrink,
    finetune,
    gradient_ascent,
    influence,
    l1_sparse,
    neggrad_plus,
    random_label,
    retrain,
    salun,
    salun_soft,
    scrub,
    sfr_on,
)
from salun_core.methods.classification.method import Method, Task
from salun_core.methods.classification.training import reinitialised
from salun_core.methods.config import UnlearnConfig, pick_device
from salun_core.methods.distributed import ALONE, SharedCheckpoint, World
from salun_core.methods.loop import OnEpoch, epoch_generator, run_loop
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask

__all__ = ["METHODS", "FileCheckpoint", "UnlearnConfig", "UnlearnResult", "method_config", "pick_device", "unlearn"]

METHODS: dict[str, Method] = {
    "salun": salun.METHOD,
    "random_label": random_label.METHOD,
    "retrain": retrain.METHOD,
    "finetune": finetune.METHOD,
    "gradient_ascent": gradient_ascent.METHOD,
    "influence": influence.METHOD,
    "boundary_expanding": boundary_expanding.METHOD,
    "boundary_shrink": boundary_shrink.METHOD,
    "l1_sparse": l1_sparse.METHOD,
    "salun_soft": salun_soft.METHOD,
    "scrub": scrub.METHOD,
    "neggrad_plus": neggrad_plus.METHOD,
    "sfr_on": sfr_on.METHOD,
}

Images = ImageSet | Dataset[tuple[Tensor, int]] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class UnlearnResult:
    """What a method made.

    Args:
        model: in eval mode; the model that was given is unchanged.
        method: its name.
        config: resolved.
        history: one record an epoch; empty after a method in closed form.
        seconds: wall clock, of loop or edit only.
        passes: images that went forward and backward; one that only goes forward counts 1/3, rounded up in all.
        moved: share of weights whose value differs from the original's, from 0 to 1.
    """

    model: nn.Module
    method: str
    config: UnlearnConfig
    history: list[EpochRecord]
    seconds: float
    passes: int
    moved: float


def get_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        UsageError: there is none of that name (with the nearest match).
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def method_config(method: str, overrides: Mapping[str, Any] | None = None) -> UnlearnConfig:
    """Resolve a method's configuration: its own defaults, then what the user gave.

    Raises:
        UsageError: an unknown method or key, a value out of range (all faults are listed), or a setting that only
            other methods read.
    """
    row = get_method(method)
    config = parse(UnlearnConfig, {**row.defaults, **(overrides or {})}, f"configuration of {method}")
    if row.fresh_start and config.batch_norm == "freeze":
        raise UsageError(
            f"{method} cannot freeze batch norm", "fresh weights have no statistics yet", "set batch_norm: update"
        )
    unread = sorted({key for other in METHODS.values() for key in other.reads} - row.reads)
    ignored = [key for key in unread if getattr(config, key) != UnlearnConfig.model_fields[key].default]
    if ignored:
        raise UsageError(f"{method} does not read {', '.join(ignored)}", "it would be ignored", "leave it out")
    return config


def unlearn(
    model: nn.Module,
    method: str = "salun",
    *,
    forget: Images,
    retain: Images,
    config: UnlearnConfig | Mapping[str, Any] | None = None,
    mask: SaliencyMask | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
    world: World = ALONE,
) -> UnlearnResult:
    """Make a model forget a set of images.

    Args:
        model: the original; it is copied, not changed.
        method: a name of `METHODS`.
        forget: D_f with true labels: an `ImageSet`, (images, labels), or a torch data set.
        retain: D_r with true labels.
        config: a `UnlearnConfig`, or what differs from the method's defaults.
        mask: for methods that need one; refused by those that do not.
        fresh: builds fresh weights for `retrain`; by default the model's layers are initialised anew.
        checkpoint: keeps the state after each epoch, and resumes from it.
        on_epoch: called after each epoch.
        world: this process, where several that have joined share the work; all get the same new model.

    Returns:
        The new model with its history.

    Raises:
        UsageError: an unknown method or configuration; a mask missing or not wanted.
        DataError: an empty forget or retain set, or labels out of range.
        ModelError: the loss became NaN or infinite.
        IntegrityError: several processes were not given the same, or ended with different weights.
    """
    row = get_method(method)
    settings = config if isinstance(config, UnlearnConfig) else method_config(method, config)
    _check_mask(method, row, mask)
    device = pick_device(settings.device)
    sets = ImageSet.of(forget).to(device), ImageSet.of(retain).to(device)
    started = _started(model, row, fresh, settings.seed, device)
    original = _on(copy.deepcopy(model), device).requires_grad_(False).eval() if row.needs_original else None
    task = Task(*sets, _checked_classes(started, *sets), settings.order, settings, started, original)
    fingerprint = _fingerprint(model, method, settings, mask, task) if checkpoint or world.size > 1 else ""
    world.require_same("model, data, mask or configuration", f"{fingerprint} {checkpoint is None}")
    begun = time.perf_counter()
    shared = SharedCheckpoint(checkpoint, world) if checkpoint else None
    history = _run(row, task, mask, shared, fingerprint, on_epoch, world)
    seconds = time.perf_counter() - begun
    return UnlearnResult(started, method, settings, history, seconds, _passes(row, task), _moved(model, started))


def _check_mask(method: str, row: Method, mask: SaliencyMask | None) -> None:
    if row.needs_mask and mask is None:
        raise UsageError(f"{method} needs a mask", "it trains salient weights only", "compute one with `salun mask`")
    if mask is not None and not row.needs_mask:
        raise UsageError(
            f"{method} takes no mask", "it would be ignored", "use the method salun, or leave the mask out"
        )


def _started(
    model: nn.Module, row: Method, fresh: Callable[[], nn.Module] | None, seed: int, device: torch.device
) -> nn.Module:
    started = fresh() if row.fresh_start and fresh else copy.deepcopy(model)
    if row.fresh_start and not fresh:
        reinitialised(started, seed)
    return _on(started, device)


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _run(
    row: Method,
    task: Task,
    mask: SaliencyMask | None,
    checkpoint: CheckpointStore | None,
    fingerprint: str,
    on_epoch: OnEpoch | None,
    world: World,
) -> list[EpochRecord]:
    """Train or edit the task's model in place; its architecture is the same afterwards."""
    assert task.model is not None
    if row.edit is not None:
        row.edit(task)
        world.settle(task.model)
        task.model.eval()
        return []
    assert row.parts is not None
    shapes = _shapes(task.model)
    begun, parts, config = row.begin(task) if row.begin else task, row.parts, task.config
    epochs = {epoch_generator(config.seed, epoch).initial_seed(): epoch for epoch in range(config.epochs)}
    history = run_loop(
        task.model,
        lambda generator: parts(replace(begun, epoch=epochs[generator.initial_seed()]), generator),
        config,
        mask,
        checkpoint,
        fingerprint,
        on_epoch,
        world,
    )
    if row.finish:
        row.finish(task.model, task.num_classes)
    assert _shapes(task.model) == shapes
    return history


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _passes(row: Method, task: Task) -> int:
    if row.passes:
        return math.ceil(row.passes(task) - 1e-6)
    assert row.parts is not None
    return task.config.epochs * sum(len(part) for part in row.parts(task, torch.Generator().manual_seed(0)))


def _moved(before: nn.Module, after: nn.Module) -> float:
    """Return the share of weights that differ; fresh weights of another architecture have all moved."""
    pairs = list(zip(before.parameters(), after.parameters(), strict=False))
    if any(old.shape != new.shape for old, new in pairs):
        return 1.0
    differing = sum(int((old.detach().to(new.device) != new.detach()).sum()) for old, new in pairs)
    return differing / max(1, sum(new.numel() for _, new in pairs))


def _checked_classes(model: nn.Module, forget: ImageSet, retain: ImageSet) -> int:
    for name, images in (("forget", forget), ("retain", retain)):
        if len(images) == 0:
            raise DataError(f"{name} set is empty", "there is nothing to train on", "check the forget target")
    with torch.no_grad():
        inputs, _ = next(iter(forget.batches(1)))
        num_classes = int(model.eval()(inputs).shape[1])
    if num_classes < 2:
        raise DataError("the model has one class", "there is no other to forget towards", "give a classifier of two")
    largest = max(int(forget.labels.max()), int(retain.labels.max()))
    if largest >= num_classes or min(int(forget.labels.min()), int(retain.labels.min())) < 0:
        raise DataError(
            "labels are out of range", f"up to {largest} where the model has {num_classes} classes", "check the data"
        )
    return num_classes


def _fingerprint(model: nn.Module, method: str, config: UnlearnConfig, mask: SaliencyMask | None, task: Task) -> str:
    settings = config.model_dump(exclude={"device"})
    parts: list[Any] = [model_digest(model), method, settings, mask.digest if mask else None]
    for images in (task.forget, task.retain):
        pixels = None if images.ids else sha256_bytes(images.images.cpu().contiguous().numpy().tobytes())
        parts += [sha256_bytes(images.labels.cpu().numpy().tobytes()), list(images.ids), list(images.images.shape)]
        parts += [pixels, images.augment, images.normalisation.mean if images.normalisation else None]
    return digest_json(parts)
