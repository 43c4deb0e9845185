"""Unlearning methods for diffusion models, on the same resumable loop as the classifier methods."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from salun_core.diffusion.conditions import TextEncoder
from salun_core.diffusion.denoiser import Denoiser
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import DataError, UsageError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import pick_device
from salun_core.methods.diffusion import (
    adversarial_unlearning,
    erased_stable_diffusion,
    finetune,
    forget_me_not,
    gradient_ascent,
    random_label,
    rece,
    retrain,
    salun,
    stereo,
    unified_concept_editing,
)
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import (
    DiffusionContext,
    DiffusionMethod,
    ExampleSets,
    StepLoss,
    Training,
    denoising_phase,
)
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup, SharedCheckpoint
from salun_core.methods.loop import OnEpoch, run_loop
from salun_core.methods.method import UnlearnResult, fresh_seed, get_method, resolve_config, settings_of
from salun_core.methods.offload import put_away
from salun_core.methods.sharded import collected, require_several, shard_weights
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask

METHODS: dict[str, DiffusionMethod[Any]] = {
    "salun": salun.METHOD,
    "random_label": random_label.METHOD,
    "finetune": finetune.METHOD,
    "gradient_ascent": gradient_ascent.METHOD,
    "retrain": retrain.METHOD,
    "esd": erased_stable_diffusion.METHOD,
    "forget_me_not": forget_me_not.METHOD,
    "uce": unified_concept_editing.METHOD,
    "rece": rece.METHOD,
    "stereo": stereo.METHOD,
    "adv_unlearn": adversarial_unlearning.METHOD,
}

DEFAULT = "salun"
"""The method of a run that names none."""


def diffusion_config(name: str, overrides: Mapping[str, Any] | None = None) -> DiffusionConfig:
    """Resolve the configuration of a diffusion method; see `salun_core.methods.method.resolve_config`."""
    config: DiffusionConfig = resolve_config(METHODS, name, overrides)
    return config


def unlearn_denoiser(
    denoiser: Denoiser,
    sets: ExampleSets,
    method: str = DEFAULT,
    *,
    config: DiffusionConfig | Mapping[str, Any] | None = None,
    mask: SaliencyMask | None = None,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> UnlearnResult:
    """Return a new network that forgot, with its history; the original stays unchanged.

    `config` may be what differs from the method's defaults. With `offload` the original's weights are away while the
    copy is trained. With `selection: text` the sets need the text encoder, the network is the original's, and the text
    encoder is new.
    """
    row, settings = get_method(METHODS, method), settings_of(METHODS, method, config)
    row.check_mask(method, mask)
    row.check(method, settings)
    row.check_sharding(method, settings)
    shards = settings.sharding == "fsdp"
    if shards:
        require_several(group.size)
    _check_sets(sets)
    device = pick_device(settings.device)
    network = _start(denoiser, row, settings, len(sets.retain))
    network = shard_weights(network, device) if shards else network.to(device)
    text = _text_encoder(sets, settings)
    sets = sets.to(device)
    text = text.to(device) if text else None
    original = (denoiser.of(network.eval()) if text else _frozen(denoiser, device)) if row.needs_original else None
    context = DiffusionContext(denoiser.of(network), original, sets, settings, torch.Generator(), text)
    fingerprint = _fingerprint(denoiser, method, settings, mask, sets) if checkpoint or group.size > 1 else ""
    group.require_same("model, data, mask or configuration", f"{fingerprint} {checkpoint is None}")
    started = time.perf_counter()
    shared = SharedCheckpoint(checkpoint, group) if checkpoint else None
    with put_away(denoiser.network, settings.offload):
        history = _run(row, context, mask, shared, fingerprint, on_epoch, group)
    network = collected(network, denoiser.network, group.main) if shards else network
    network.requires_grad_(True).eval()
    seconds, encoder = time.perf_counter() - started, text.network.requires_grad_(True).eval() if text else None
    return UnlearnResult(network, method, settings, history, seconds, row.cost(settings), text_encoder=encoder)


def _run(
    row: DiffusionMethod[Any],
    context: DiffusionContext[Any],
    mask: SaliencyMask | None,
    checkpoint: CheckpointStore | None,
    fingerprint: str,
    on_epoch: OnEpoch | None,
    group: ProcessGroup,
) -> list[EpochRecord]:
    """Edit or train the context's model in place, and return one record per epoch."""
    if row.edit is not None:
        with torch.no_grad():
            row.edit(context.denoiser, context.sets, context.config)
        return []
    trained = context.text.network if context.text else context.denoiser.network

    def loop(
        context: DiffusionContext[Any], loss: StepLoss, store: CheckpointStore | None, of: str, told: OnEpoch | None
    ) -> list[EpochRecord]:
        phases = [denoising_phase(replace(row, loss=loss), context)]
        return run_loop(trained, lambda *_: phases, context.config, mask, store, of, told, group)

    if row.stages is not None:
        return row.stages(context, Training(loop, checkpoint, fingerprint, on_epoch, group))
    assert row.loss is not None
    return loop(context, row.loss, checkpoint, fingerprint, on_epoch)


def _check_sets(sets: ExampleSets) -> None:
    for name, examples in (("forget", sets.forget), ("retain", sets.retain)):
        if len(examples) == 0:
            raise DataError(f"{name} set is empty", "there is nothing to train on", "check the forget target")
    if sets.forget.pseudo is None or bool((sets.forget.pseudo == sets.forget.condition).any()):
        raise DataError(
            "a forget example is to look like itself",
            "its pseudo condition equals its condition",
            "name another anchor",
        )


def _start(denoiser: Denoiser, row: DiffusionMethod[Any], config: DiffusionConfig, retained: int) -> nn.Module:
    """Copy the network, or build it with fresh weights; only the selected parameters are trained."""
    network: Any = copy.deepcopy(denoiser.network)
    if row.fresh_start:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fresh_seed(config.seed, retained))
            network = type(network).from_config(network.config)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    chosen = set(denoiser.selected(config.selection))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(row.needs_mask or name in chosen)
    return network  # type: ignore[no-any-return]


def _text_encoder(sets: ExampleSets, config: DiffusionConfig) -> TextEncoder | None:
    """Copy the text encoder if it is to be trained, with only its trained parameters open."""
    if config.selection != "text":
        return None
    if sets.encoder is None:
        raise UsageError("there is no text encoder to train", "the examples were built without it", "choose xattn")
    text = replace(sets.encoder, network=copy.deepcopy(sets.encoder.network))
    chosen = set(text.trained_parameters())
    for name, parameter in text.network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return text


def _frozen(denoiser: Denoiser, device: torch.device) -> Denoiser:
    return denoiser.of(copy.deepcopy(denoiser.network).to(device).requires_grad_(False).eval())


def _fingerprint(
    denoiser: Denoiser, method: str, config: DiffusionConfig, mask: SaliencyMask | None, sets: ExampleSets
) -> str:
    machine = {"device", "offload", "sharding"}  # a run may be resumed on another one
    parts: list[Any] = [model_digest(denoiser.network), method, config.model_dump(exclude=machine)]
    parts += [mask.digest if mask else None, list(sets.table.names)]
    parts += [model_digest(sets.encoder.network)] if sets.encoder else []
    for examples in (sets.forget, sets.retain):
        tensors = (examples.mean, examples.std, examples.condition, examples.pseudo)
        parts += [sha256_bytes(item.cpu().contiguous().numpy().tobytes()) for item in tensors if item is not None]
    return digest_json(parts)
