"""The saliency of a denoiser's weights: |d E||ε - ε_θ(x_t | c)||² / d weight| over the forget set."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import noised
from salun_core.errors import DataError
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import ExampleSets
from salun_core.methods.diffusion.objectives import denoising_loss
from salun_core.saliency import SaliencyMask
from salun_core.saliency.mask import Shapes
from salun_core.saliency.scores import mean_magnitude, scoring


def denoising_scores(denoiser: Denoiser, sets: ExampleSets, config: DiffusionConfig) -> dict[str, Tensor]:
    """Score the selected parameters by the magnitude of the denoising loss's gradient over the forget set.

    The gradient is of the mean over samples, passes and times. It is accumulated in `.grad`, without a second copy.

    Args:
        denoiser: θ_o, on the device of the sets; the call does not change it.
        sets: D_f with its conditions.
        config: batch size, passes, distribution of times, selection, seed.

    Returns:
        By parameter name, in the network's order: a tensor of the parameter's shape, >= 0; selected ones only.

    Raises:
        DataError: the forget set is empty.
        ModelError: a gradient is NaN or infinite.
        UsageError: the selection is empty.

    Source:
        Fan et al., "SalUn", ICLR 2024, equations (4) and (6).
    """
    chosen = denoiser.selected(config.selection)
    total = config.saliency_passes * len(sets.forget)
    if total == 0:
        raise DataError("forget set is empty", "there is nothing to score", "name at least one sample to forget")
    network = denoiser.network
    with scoring(network):
        wanted = set(chosen)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in wanted)
        generator = torch.Generator().manual_seed(config.seed)
        for _ in range(config.saliency_passes):
            _accumulate(denoiser, sets, config, generator)
        parameters = dict(network.named_parameters())
        scores = {}
        for name in chosen:
            grad = parameters[name].grad
            scores[name] = torch.zeros_like(parameters[name]) if grad is None else mean_magnitude(name, grad, total)
            parameters[name].grad = None
        return {name: score.detach() for name, score in scores.items()}


def _accumulate(denoiser: Denoiser, sets: ExampleSets, config: DiffusionConfig, generator: torch.Generator) -> None:
    count = len(sets.forget)
    times = _times(denoiser.process.times, count, config, generator)
    for index in torch.split(torch.arange(count), config.batch_size):
        batch = noised(sets.forget.select(index), denoiser.process, generator, times[index])
        (denoising_loss(denoiser, batch, sets.table) * len(index)).backward()  # type: ignore[no-untyped-call]


def _times(times: int, count: int, config: DiffusionConfig, generator: torch.Generator) -> Tensor:
    """Draw uniform times; stratified times fall into `count` equal intervals, one each, in random order."""
    if config.saliency_times == "uniform":
        return torch.randint(times, (count,), generator=generator)
    places = (torch.arange(count) + torch.rand(count, generator=generator)) * (times / count)
    return places.long().clamp_(max=times - 1)[torch.randperm(count, generator=generator)]


def denoiser_mask(denoiser: Denoiser, scores: Mapping[str, Tensor], density: float) -> SaliencyMask:
    """Make the mask of a whole denoiser from the scores of its selected part.

    Args:
        denoiser: names and shapes.
        scores: of the selected parameters.
        density: share of the selected weights to keep salient, in (0, 1].

    Returns:
        A mask over all parameters; those outside the selection are frozen.
    """
    return within(denoiser, SaliencyMask.from_scores(scores, density))


def random_denoiser_mask(denoiser: Denoiser, config: DiffusionConfig, density: float, seed: int) -> SaliencyMask:
    """Draw as many of the selected weights at random: the control for saliency."""
    shapes = shapes_of(denoiser)
    chosen = {name: shapes[name] for name in denoiser.selected(config.selection)}
    return within(denoiser, SaliencyMask.random(chosen, density, seed))


def selection_mask(denoiser: Denoiser, config: DiffusionConfig) -> SaliencyMask:
    """Make every selected weight salient: what a method without a mask trains."""
    shapes = shapes_of(denoiser)
    return within(denoiser, SaliencyMask.full({name: shapes[name] for name in denoiser.selected(config.selection)}))


def within(denoiser: Denoiser, mask: SaliencyMask) -> SaliencyMask:
    """Return a mask of some parameters as a mask of all, the others frozen."""
    import numpy as np

    shapes = dict(shapes_of(denoiser))
    bits = {
        name: mask.bits[name] if name in mask.bits else np.zeros(-(-math.prod(shape) // 8), dtype=np.uint8)
        for name, shape in shapes.items()
    }
    return SaliencyMask(shapes, bits, mask.k, mask.facts)


def shapes_of(denoiser: Denoiser) -> Shapes:
    """Return the shape of every parameter, in the network's order."""
    return {name: tuple(parameter.shape) for name, parameter in denoiser.network.named_parameters()}
