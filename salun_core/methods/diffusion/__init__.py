"""Unlearning methods for diffusion models, on the same resumable loop as the classifiers' methods."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from salun_core.config import parse
from salun_core.diffusion.denoiser import Denoiser
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import DataError, UsageError, unknown_name
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import pick_device
from salun_core.methods.diffusion import (
    erased_stable_diffusion,
    finetune,
    forget_me_not,
    gradient_ascent,
    random_label,
    retrain,
    salun,
    unified_concept_editing,
)
from salun_core.methods.diffusion.config import GenerationConfig
from salun_core.methods.diffusion.method import DiffusionStretch, GenerationMethod, Setting, Task
from salun_core.methods.diffusion.objectives import check_alpha
from salun_core.methods.distributed import ALONE, SharedCheckpoint, World
from salun_core.methods.loop import OnEpoch, run_loop
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask

METHODS: dict[str, GenerationMethod] = {
    "salun": salun.METHOD,
    "random_label": random_label.METHOD,
    "finetune": finetune.METHOD,
    "gradient_ascent": gradient_ascent.METHOD,
    "retrain": retrain.METHOD,
    "esd": erased_stable_diffusion.METHOD,
    "forget_me_not": forget_me_not.METHOD,
    "uce": unified_concept_editing.METHOD,
}


@dataclass(frozen=True)
class GenerationResult:
    """What a method made.

    Args:
        denoiser: the new one, in eval mode; the one that was given is unchanged.
        method: its name.
        config: resolved.
        history: one record an epoch.
        seconds: wall clock, loop or edit only.
        passes: examples that went through the network forward and backward.
    """

    denoiser: Denoiser
    method: str
    config: GenerationConfig
    history: list[EpochRecord]
    seconds: float
    passes: int


def get_generation_method(name: str) -> GenerationMethod:
    """Return a method for diffusion models by name.

    Raises:
        UsageError: there is none of that name (with the nearest match).
    """
    if name not in METHODS:
        raise unknown_name("method for diffusion models", name, METHODS)
    return METHODS[name]


def generation_config(method: str, overrides: Mapping[str, Any] | None = None) -> GenerationConfig:
    """Resolve a method's configuration: its own defaults, then what the user gave.

    Raises:
        UsageError: an unknown method or key, a value out of range (all faults are listed), or α = 0 unless forced.
    """
    row = get_generation_method(method)
    config = parse(GenerationConfig, {**row.defaults, **(overrides or {})}, f"configuration of {method}")
    why = check_alpha(config)
    if why and row.needs_forget and row.needs_retain:
        raise UsageError("alpha 0 is refused", why, "give an alpha above 0, or force it by allow_zero_alpha: true")
    return config


def unlearn_generation(
    denoiser: Denoiser,
    task: Task,
    method: str = "salun",
    *,
    config: GenerationConfig | Mapping[str, Any] | None = None,
    mask: SaliencyMask | None = None,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
    world: World = ALONE,
) -> GenerationResult:
    """Make a diffusion model forget.

    Args:
        denoiser: the original; its network is copied, not changed.
        task: what to forget and to keep.
        method: a name of `METHODS`.
        config: a `GenerationConfig`, or what differs from the method's defaults.
        mask: for methods that need one; refused by those that do not.
        checkpoint: keeps the state after each epoch, and resumes from it.
        on_epoch: called after each epoch.
        world: this process, where several that have joined share the work.

    Returns:
        The new denoiser with its history.

    Raises:
        UsageError: an unknown method or configuration; a mask missing or not wanted.
        DataError: nothing to forget or nothing to keep.
        ModelError: the loss became NaN or infinite.
    """
    row = get_generation_method(method)
    settings = config if isinstance(config, GenerationConfig) else generation_config(method, config)
    _check(row, method, task, mask)
    device = pick_device(settings.device)
    network = _start(denoiser, row, settings).to(device)
    task = task.to(device)
    fingerprint = _fingerprint(denoiser, method, settings, mask, task) if checkpoint or world.size > 1 else ""
    world.require_same("model, data, mask or configuration", f"{fingerprint} {checkpoint is None}")
    started = time.perf_counter()
    history: list[EpochRecord] = []
    if row.edit is not None:
        with torch.no_grad():
            row.edit(denoiser.of(network), task, settings)
    else:
        original = _frozen(denoiser, device) if row.needs_original else None
        setting = Setting(denoiser.of(network), original, task, settings, torch.Generator())
        history = run_loop(
            network,
            lambda _: [DiffusionStretch(row, setting, settings.steps // settings.epochs)],
            settings,
            mask,
            SharedCheckpoint(checkpoint, world) if checkpoint else None,
            fingerprint,
            on_epoch,
            world,
        )
    network.requires_grad_(True).eval()
    per_step = settings.batch_size * (int(row.needs_forget) + int(row.needs_retain))
    passes = 0 if row.edit else settings.steps * per_step
    return GenerationResult(denoiser.of(network), method, settings, history, time.perf_counter() - started, passes)


def _check(row: GenerationMethod, method: str, task: Task, mask: SaliencyMask | None) -> None:
    if row.needs_mask and mask is None:
        raise UsageError(f"{method} needs a mask", "it trains salient weights only", "compute one with `salun mask`")
    if mask is not None and not row.needs_mask:
        raise UsageError(
            f"{method} takes no mask", "it would be ignored", "use the method salun, or leave the mask out"
        )
    for name, examples in (("forget", task.forget), ("retain", task.retain)):
        if len(examples) == 0:
            raise DataError(f"{name} set is empty", "there is nothing to train on", "check the forget target")
    if task.forget.pseudo is None or bool((task.forget.pseudo == task.forget.condition).any()):
        raise DataError(
            "a forget example is to look like itself", "its pseudo condition is its own", "name another anchor"
        )


def _start(denoiser: Denoiser, row: GenerationMethod, config: GenerationConfig) -> nn.Module:
    """Copy the network, or build it anew; only what the selection means is trained."""
    network: Any = copy.deepcopy(denoiser.network)
    if row.fresh_start:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = type(network).from_config(network.config)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    chosen = set(denoiser.selected(config.selection))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(row.needs_mask or name in chosen)
    return network  # type: ignore[no-any-return]


def _frozen(denoiser: Denoiser, device: torch.device) -> Denoiser:
    return denoiser.of(copy.deepcopy(denoiser.network).to(device).requires_grad_(False).eval())


def _fingerprint(
    denoiser: Denoiser, method: str, config: GenerationConfig, mask: SaliencyMask | None, task: Task
) -> str:
    parts: list[Any] = [model_digest(denoiser.network), method, config.model_dump(exclude={"device"})]
    parts += [mask.digest if mask else None, list(task.table.names)]
    for examples in (task.forget, task.retain):
        tensors = (examples.mean, examples.std, examples.condition, examples.pseudo)
        parts += [sha256_bytes(item.cpu().contiguous().numpy().tobytes()) for item in tensors if item is not None]
    return digest_json(parts)
