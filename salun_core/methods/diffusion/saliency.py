"""The saliency of a denoiser's weights: |d E||ε - ε_θ(x_t | c)||² / d weight| over the forget set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from salun_core.device_memory import explained
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import noised
from salun_core.errors import DataError
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import ExampleSets
from salun_core.methods.diffusion.objectives import denoising_loss
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.sharded import collected_scores, require_several, shard_weights
from salun_core.saliency.masked_step import own
from salun_core.saliency.scores import mean_magnitude, scoring
from salun_core.telemetry.progress import tracked


def denoising_scores(
    denoiser: Denoiser, sets: ExampleSets, config: DiffusionConfig, group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Score the selected parameters by the magnitude of the denoising loss's gradient over the forget set.

    The result has non-negative tensors of the parameters' shapes, by name in the network's order. The gradient of the
    mean over samples, passes and times accumulates in `.grad`, without a second copy. The denoiser is unchanged
    afterwards. All processes of the group get the scores, in main memory. A gradient that is not finite is a
    `ModelError`.

    Source:
        Fan et al., "SalUn", ICLR 2024, equations (4) and (6).
    """
    chosen = denoiser.selected(config.selection)
    total = config.saliency_passes * len(sets.forget)
    if total == 0:
        raise DataError("forget set is empty", "there is nothing to score", "name at least one sample to forget")
    sharded, network = config.sharding == "fsdp", denoiser.network
    if sharded:
        require_several(group.size)
        network = shard_weights(copy.deepcopy(network).cpu(), sets.forget.mean.device)
    counts = 1.0 if group.main or not sharded else 0.0
    with scoring(network), checkpointed(network, config.gradient_checkpointing):
        wanted = set(chosen)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in wanted)
        generator = torch.Generator().manual_seed(config.seed)
        for _ in tracked(range(config.saliency_passes), "scoring", config.saliency_passes):
            _accumulate(denoiser.of(network), sets, config, generator, counts)
        parameters = dict(network.named_parameters())
        scores = {}
        for name in chosen:
            grad, mine = parameters[name].grad, own(parameters[name])
            scores[name] = torch.zeros_like(mine) if grad is None else mean_magnitude(name, own(grad), total)
            parameters[name].grad = None
        found = {name: score.detach() for name, score in scores.items()}
        return collected_scores(network, found) if sharded else found


@contextmanager
def checkpointed(network: Any, on: bool) -> Iterator[None]:  # noqa: ANN401 - of diffusers
    """Recompute activations in the backward pass while the block runs, if `on`; gradients have the same bits."""
    change = on and not network.is_gradient_checkpointing
    if change:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if change:
            network.disable_gradient_checkpointing()


def _accumulate(
    denoiser: Denoiser, sets: ExampleSets, config: DiffusionConfig, generator: torch.Generator, counts: float
) -> None:
    count = len(sets.forget)
    times = _times(denoiser.process.times, count, config, generator)
    for index in torch.split(torch.arange(count), config.batch_size):
        batch = noised(sets.forget.select(index), denoiser.process, generator, times[index])
        # A batch is never divided: other summands would have other bits, and so would the mask.
        with explained(f"{len(index)} samples, which must be scored at once, do not fit"):
            loss = denoising_loss(denoiser, batch, sets.table) * len(index)
            (loss * counts).backward()  # type: ignore[no-untyped-call]


def _times(times: int, count: int, config: DiffusionConfig, generator: torch.Generator) -> Tensor:
    """Draw uniform times; stratified times fall into `count` equal intervals, one each, in random order."""
    if config.saliency_times == "uniform":
        return torch.randint(times, (count,), generator=generator)
    places = (torch.arange(count) + torch.rand(count, generator=generator)) * (times / count)
    return places.long().clamp_(max=times - 1)[torch.randperm(count, generator=generator)]
