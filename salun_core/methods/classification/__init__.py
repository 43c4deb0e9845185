"""Unlearning methods of classifiers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from salun_core.data.images import Images, ImageSet, ImageSource
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import DataError
from salun_core.methods.checkpoint import CheckpointStore, FileCheckpoint
from salun_core.methods.classification import (
    amun,
    boundary_expanding,
    boundary_shrink,
    ct,
    finetune,
    gradient_ascent,
    influence,
    l1_sparse,
    lotus,
    msg,
    neggrad_plus,
    random_label,
    retrain,
    salun,
    salun_adaptive,
    salun_lotus,
    salun_soft,
    scrub,
    sfr_on,
)
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, Trained, Training
from salun_core.methods.classification.rum import expected_cost, forget_in_parts
from salun_core.methods.classification.training import reinitialised
from salun_core.methods.config import UnlearnConfig, pick_device
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup, SharedCheckpoint
from salun_core.methods.loop import OnEpoch, run_loop
from salun_core.methods.method import UnlearnResult, fresh_seed, get_method, resolve_config, settings_of
from salun_core.methods.sharded import collected, is_sharded, require_several, shard_weights
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.saliency.masked_step import own, own_part

__all__ = ["METHODS", "FileCheckpoint", "UnlearnConfig", "UnlearnResult", "method_config", "pick_device", "unlearn"]

METHODS: dict[str, ClassifierMethod[Any]] = {
    "salun_adaptive": salun_adaptive.METHOD,
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
    "lotus": lotus.METHOD,
    "salun_lotus": salun_lotus.METHOD,
    "msg": msg.METHOD,
    "ct": ct.METHOD,
    "amun": amun.METHOD,
}

DEFAULT = "salun_adaptive"
"""The method of a run that names none: docs/research/study.md has it tied with the best of most suites."""


def method_config(name: str, overrides: Mapping[str, Any] | None = None) -> UnlearnConfig:
    """Resolve the configuration of a classifier method; see `salun_core.methods.method.resolve_config`."""
    config: UnlearnConfig = resolve_config(METHODS, name, overrides)
    return config


def expected_passes(row: ClassifierMethod[Any], context: ClassifierContext[Any]) -> int:
    """Return the cost of a run in image passes before it begins."""
    return rounded_up(expected_cost(row, context))


def unlearn(
    model: nn.Module,
    method: str = DEFAULT,
    *,
    forget: Images,
    retain: Images,
    config: UnlearnConfig | Mapping[str, Any] | None = None,
    mask: SaliencyMask | None = None,
    held_out: Images | None = None,
    fresh: Callable[[int], nn.Module] | None = None,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> UnlearnResult:
    """Return a new model that forgot a set of images, with its history; the original stays unchanged.

    `forget` and `retain` have true labels, as `ImageSet.of` accepts them, and `config` may be what differs from the
    method's defaults. `held_out` are images that the model was not trained on, on which LoTUS and `salun_adaptive`
    measure it. The test data must not be among them. Without them `salun_adaptive` holds back a part of D_r, which is
    less informative. `fresh` builds a model from a seed, for `retrain`; by default the layers of `model` are reset. All
    processes of the `group` get the same model. With `sharding: fsdp` the first one gets it in main memory, and the
    others get it without weights.
    """
    row, settings = get_method(METHODS, method), settings_of(METHODS, method, config)
    row.check_mask(method, mask)
    row.check_sharding(method, settings)
    shards = settings.sharding == "fsdp"
    if shards:
        require_several(group.size)
    device = pick_device(settings.device)
    placed = partial(shard_weights if shards else _on, device=device)
    d_f, d_r = ImageSet.of(forget, "forget").to(device), ImageSet.of(retain, "retain").to(device)
    unseen = _of_kept_classes(held_out, d_r) if held_out is not None and row.reads_held_out else None
    original = placed(copy.deepcopy(model).requires_grad_(False)).eval() if row.needs_original else None
    started = placed(_started(model, row, fresh, fresh_seed(settings.seed, len(d_r))))
    classes = _checked_classes(started, d_f, d_r)
    context = ClassifierContext(d_f, d_r, classes, settings, started, original, held_out=unseen)
    fingerprint = _fingerprint(model, method, mask, context) if checkpoint or group.size > 1 else ""
    group.require_same("model, data, mask or configuration", f"{fingerprint} {checkpoint is None}")

    begun = time.perf_counter()
    shared = SharedCheckpoint(checkpoint, group) if checkpoint else None
    trained = _runner(row, settings)(context, Training(mask, shared, fingerprint, on_epoch, group))
    seconds = time.perf_counter() - begun

    changed = _changed_fraction(model, started, group)
    made = collected(started, model, group.main).eval() if shards else started
    passes = rounded_up(trained.cost)
    return UnlearnResult(made, method, settings, trained.history, seconds, passes, changed, trained.ended)


def _runner(row: ClassifierMethod[Any], config: UnlearnConfig) -> Callable[[ClassifierContext[Any], Training], Trained]:
    """Return what runs a method: itself, its phases on one part of D_f after the other, or once on all of it."""
    if row.train is not None:
        return row.train
    once = partial(_run, row)
    return partial(forget_in_parts, once) if config.forget_parts > 1 else once


def rounded_up(cost: float) -> int:
    """Return a cost in whole image passes; a sum of thirds may lie just above an integer."""
    return math.ceil(cost - 1e-6)


def _started(
    model: nn.Module, row: ClassifierMethod[Any], fresh: Callable[[int], nn.Module] | None, seed: int
) -> nn.Module:
    if not row.fresh_start:
        return copy.deepcopy(model)
    return fresh(seed) if fresh else reinitialised(copy.deepcopy(model), seed)


def _of_kept_classes(held_out: Images, retain: ImageSource) -> ImageSource:
    """Return the held-out images of classes that are retained: a model without D_f would not know the others."""
    images = ImageSet.of(held_out, "held-out").to(retain.labels.device)
    return images.select(torch.isin(images.labels, retain.labels).nonzero().flatten())


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _run(row: ClassifierMethod[Any], context: ClassifierContext[Any], training: Training) -> Trained:
    """Train or edit the context's model in place. Its architecture is unchanged afterwards."""
    model, group = context.model, training.group
    assert model is not None
    if row.edit is not None:
        row.edit(context)
        group.synchronise(model)
        model.eval()
        return Trained([], row.cost(context))
    phases = row.phases
    assert phases is not None
    shapes = _shapes(model)
    begun = row.begin(context) if row.begin else context
    history = run_loop(
        model,
        lambda epoch, generator: phases(replace(begun, epoch=epoch).drawn(generator), generator),
        context.config,
        training.mask,
        training.checkpoint,
        training.fingerprint,
        training.on_epoch,
        group,
    )
    if row.finish:
        row.finish(model, context.num_classes)
    assert _shapes(model) == shapes
    return Trained(history, row.cost(begun))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _changed_fraction(before: nn.Module, after: nn.Module, group: ProcessGroup) -> float:
    """Return the share of weights that differ; 1 for fresh weights of another architecture."""
    pairs = list(zip(before.parameters(), after.parameters(), strict=False))
    if any(old.shape != new.shape for old, new in pairs):
        return 1.0
    own_pairs = [(own_part(old.detach(), new), own(new).detach()) for old, new in pairs]
    differing = sum(int((old.to(new.device) != new).sum()) for old, new in own_pairs)
    if is_sharded(after):
        differing = int(group.total(torch.tensor(differing)))
    return differing / max(1, sum(new.numel() for _, new in pairs))


def _checked_classes(model: nn.Module, forget: ImageSource, retain: ImageSource) -> int:
    for name, images in (("forget", forget), ("retain", retain)):
        if len(images) == 0:
            raise DataError(f"{name} set is empty", "there is nothing to train on", "check the forget target")
    with torch.no_grad():
        inputs, _ = next(iter(forget.select([0]).batches(1)))
        num_classes = int(model.eval()(inputs).shape[1])
    if num_classes < 2:
        raise DataError("the model has one class", "forgetting needs another class", "give a classifier with two")
    largest = max(int(forget.labels.max()), int(retain.labels.max()))
    if largest >= num_classes or min(int(forget.labels.min()), int(retain.labels.min())) < 0:
        raise DataError(
            "labels are out of range", f"up to {largest} where the model has {num_classes} classes", "check the data"
        )
    return num_classes


def _fingerprint(model: nn.Module, method: str, mask: SaliencyMask | None, context: ClassifierContext[Any]) -> str:
    settings = context.config.model_dump(exclude={"device", "sharding"})
    parts: list[Any] = [model_digest(model), method, settings, mask.digest if mask else None]
    held_out = [context.held_out] if context.held_out is not None else []
    for images in (context.forget, context.retain, *held_out):
        stored = None if images.ids else images.pixels(range(len(images))).cpu().contiguous()
        pixels = None if stored is None else sha256_bytes(stored.numpy().tobytes())
        parts += [sha256_bytes(images.labels.cpu().numpy().tobytes()), list(images.ids), [len(images), *images.shape]]
        parts += [pixels, images.augment, images.normalisation.mean if images.normalisation else None]
    return digest_json(parts)
