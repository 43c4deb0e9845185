"""Erased Stable Diffusion (ESD): steer the conditional prediction away from the concept, as guidance would.

    ε_θ(x_t, c) -> ε_o(x_t, ∅) - η (ε_o(x_t, c) - ε_o(x_t, ∅))

η is `negative_guidance`. The model in training generates x_t itself: it denoises pure noise, with guidance, to a random
time. Forget examples only provide shapes, conditions and the noise; their images are not used. `selection: xattn` is
ESD-x, for concepts that a prompt names. `noxattn` is ESD-u, for concepts that prompts need not name, and for networks
conditioned on classes.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, section 4 (negative guidance).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Noised
from salun_core.diffusion.sampling import guidance_conditions, guided_prediction
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod
from salun_core.methods.diffusion.objectives import guided


class EsdConfig(DiffusionConfig):
    """Guidance of the target, and of the samples that the model generates."""

    negative_guidance: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="η")
    start_steps: int = Field(default=20, ge=2, description="denoising steps of the samples that it starts from")
    start_guidance: float = Field(default=3.0, ge=1, allow_inf_nan=False, description="guidance of these samples")


def loss(context: DiffusionContext[EsdConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the mean squared distance of the prediction from the negatively guided prediction of θ_o."""
    assert context.original is not None
    table = context.sets.table
    batch = partly_denoised(context, forget)
    with torch.no_grad():
        target = guided(context.original, batch, table, -context.config.negative_guidance)
    predicted = context.denoiser.predict(batch.noisy, batch.times, table.take(batch.condition))
    return mse_loss(predicted, target)


@torch.no_grad()
def partly_denoised(context: DiffusionContext[EsdConfig], batch: Noised) -> Noised:
    """Denoise a batch from pure noise to one random time, with guidance, using the model in training.

    Its noise and conditions are used, [B, ...], and its target does not change. `UsageError` without a null condition.
    """
    denoiser, config = context.denoiser, context.config
    process, scale = denoiser.process, config.start_guidance
    conditions = guidance_conditions(context.table, batch.condition, scale)
    end = int(process.draw_times(1, context.generator))
    noise = process.noise_of(batch.noisy, batch.target, batch.times)
    current = replace(batch, noisy=noise, times=torch.full_like(batch.times, process.times - 1))
    for _, time in pairwise(path(process.times, end, config.start_steps)):
        predicted = guided_prediction(denoiser, current.noisy, process.network_times(current.times), conditions, scale)
        current = ddim_step(denoiser, current, predicted, time, context.sets.pixels)
    return current


def path(times: int, end: int, steps: int) -> list[int]:
    """Return times from T - 1 down to `end`, with the spacing of `steps` steps over all T."""
    count = -(-(times - 1 - end) * steps // times)
    return [round(times - 1 - (times - 1 - end) * step / max(count, 1)) for step in range(count + 1)]


def ddim_step(denoiser: Denoiser, batch: Noised, predicted: Tensor, time: int, pixels: bool) -> Noised:
    """Step to an earlier time without new noise; for a flow this is an Euler step.

    `predicted` is the network's prediction [B, C, H, W]. Samples that are `pixels` are clipped to -1 to 1.

    Source:
        Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equation (12) with σ = 0.
    """
    process = denoiser.process
    clean = process.clean_of(batch.noisy, predicted, batch.times)
    noise = process.noise_of(batch.noisy, predicted, batch.times)
    earlier = torch.full_like(batch.times, time)
    moved = process.noisy(clean.clamp(-1, 1) if pixels else clean, noise, earlier)
    return replace(batch, noisy=moved, times=earlier)


def passes(config: EsdConfig) -> float:
    """Return the expected cost in passes: each example, its target, and its sampling to a time that is drawn."""
    sampling = (config.start_steps + 1) / 2 * (1 if config.start_guidance == 1 else 2)
    return config.steps * config.batch_size * (1 + (sampling + 2) / 3)


METHOD = DiffusionMethod(
    loss,
    config_type=EsdConfig,
    about="steers the prediction away from the concept, as guidance would",
    source='Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023',
    passes=passes,
    needs_original=True,
    needs="a null condition",
    needs_retain=False,
    defaults={"selection": "xattn", "steps": 200, "batch_size": 8, "learning_rate": 1e-5},
)
