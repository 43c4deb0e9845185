"""The mask of a denoiser: saliency over the forget set, or its control."""

from __future__ import annotations

import torch

from salun_core.diffusion import get_generation_method
from salun_core.diffusion.config import GenerationConfig
from salun_core.diffusion.saliency import denoiser_mask, denoising_scores, random_denoiser_mask, selection_mask
from salun_core.saliency import SaliencyMask
from salun_core.steps.generation.examples import build_task
from salun_core.steps.generation.inputs import GenerationInputs


def generation_mask(
    inputs: GenerationInputs,
    method: str,
    config: GenerationConfig,
    density: float,
    device: torch.device,
    random_seed: int | None = None,
) -> SaliencyMask:
    """Compute the mask of a denoiser.

    Args:
        inputs: model, data, forget set.
        method: one that takes no mask gets one in which every selected weight is salient.
        config: passes, times, selection.
        density: share of the selected weights to keep salient, in (0, 1].
        device: to compute on.
        random_seed: draw a random mask of the same density: the control.

    Returns:
        The mask over all parameters.
    """
    denoiser = inputs.family(device).denoiser
    if not get_generation_method(method).needs_mask:
        return selection_mask(denoiser, config)
    if random_seed is not None:
        return random_denoiser_mask(denoiser, config, density, random_seed)
    task = build_task(inputs, config, device, retain=False)
    scores = denoising_scores(denoiser, task, config)
    facts = {
        "scores": "denoising-gradient-magnitude",
        "selection": config.selection,
        "passes": str(config.saliency_passes),
        "times": config.saliency_times,
    }
    return denoiser_mask(denoiser, scores, density).with_facts(facts)
