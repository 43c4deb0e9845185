"""Generates images with a denoiser, batch after batch; each image has its own seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salun_core.device_memory import fitting
from salun_core.diffusion.conditions import Conditions, ConditionTable
from salun_core.diffusion.denoiser import Denoiser, require_finite
from salun_core.telemetry.progress import report

Decode = Callable[[Tensor], Tensor]
"""Latents or pixels [B, C, H, W] -> images uint8 [B, 3, H', W']."""


@dataclass(frozen=True)
class Sampler:
    """Settings of image generation.

    Args:
        scheduler: a scheduler of diffusers; it is copied for each batch.
        shape: shape of one sample, (C, H, W).
        steps: number of denoising steps.
        guidance_scale: w + 1 of classifier-free guidance; 1 means no guidance and half the work.
        batch_size: images per forward pass; fewer if the device has no room for them.
    """

    scheduler: Any
    shape: tuple[int, int, int]
    steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 64

    @classmethod
    def of_scheduler(
        cls,
        scheduler: Any,  # noqa: ANN401
        shape: tuple[int, int, int],
        *,
        latents: bool,
        **settings: Any,  # noqa: ANN401
    ) -> Sampler:
        """Build the deterministic sampler of a process: DDIM without noise, or Euler steps for flows.

        Latents of an autoencoder have no fixed range, so they are never clipped. Pixels are clipped as the scheduler's
        file sets it, and to -1 to 1 if it does not. `settings` are steps, guidance_scale and batch_size.
        """
        from diffusers import DDIMScheduler

        if "FlowMatch" in type(scheduler).__name__:
            return cls(type(scheduler).from_config(scheduler.config), shape, **settings)
        # DDIM clips by default, and the files of schedulers that know no clipping (PNDM, Euler, LMS) lack the key.
        bounds = {"clip_sample": False, "thresholding": False} if latents else {}
        made = DDIMScheduler.from_config(scheduler.config, **bounds)  # type: ignore[no-untyped-call]
        return cls(made, shape, **settings)

    @property
    def name(self) -> str:
        """Class name of the scheduler."""
        return type(self.scheduler).__name__


def starting_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return the noise of each seed, float32 [B, *shape].

    One CPU generator per image makes an image independent of its batch, of the batch size and of the device.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def samples(
    denoiser: Denoiser, table: ConditionTable, sampler: Sampler, rows: Sequence[int], seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Generate samples batch after batch, float32 [B, C, H, W], in order.

    Memory does not grow with their number or with the steps. Each sample has a condition row and a seed. The denoiser
    is set to eval mode, and the table must be on its device. A sample that is not finite is a `ModelError`.
    """
    denoiser.network.eval()
    device = next(denoiser.network.parameters()).device
    start, size = 0, sampler.batch_size
    while start < len(rows):

        def draw(count: int, first: int = start) -> Tensor:
            part = slice(first, first + count)
            noise = starting_noise(seeds[part], sampler.shape).to(device)
            return _denoised(denoiser, table, sampler, torch.tensor(rows[part], dtype=torch.int64), noise)

        drawn, size = fitting(draw, size)
        start += len(drawn)
        yield require_finite("generated images", drawn)


def _denoised(denoiser: Denoiser, table: ConditionTable, sampler: Sampler, rows: Tensor, noise: Tensor) -> Tensor:
    scheduler = type(sampler.scheduler).from_config(sampler.scheduler.config)
    scheduler.set_timesteps(sampler.steps)
    conditions = guidance_conditions(table, rows, sampler.guidance_scale)
    current = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        times = time.to(current.device).expand(len(current))
        predicted = guided_prediction(denoiser, current, times, conditions, sampler.guidance_scale)
        current = scheduler.step(predicted, time, current, return_dict=False)[0]
    return current


def guidance_conditions(table: ConditionTable, rows: Tensor, scale: float) -> Conditions:
    """Return the conditions of one call: the given rows, then, under guidance, as many null conditions.

    `UsageError` if guidance is on, but the model has no null condition.
    """
    conditions = table.take(rows)
    if scale == 1:
        return conditions
    nulls = table.nulls(len(rows))
    return {name: torch.cat([conditions[name], nulls[name]]) for name in conditions}


def guided_prediction(
    denoiser: Denoiser, noisy: Tensor, network_times: Tensor, conditions: Conditions, scale: float
) -> Tensor:
    """Return the prediction under classifier-free guidance, ε_∅ + scale (ε_c - ε_∅), [B, C, H, W].

    `network_times` are in the network's units (see `Process.network_times`), and `conditions` from
    `guidance_conditions`. A scale of 1 takes one prediction per sample, other values take two.

    Source:
        Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022; their w is scale - 1.
    """
    if scale == 1:
        return denoiser.predict_at(noisy, network_times, conditions)
    both = denoiser.predict_at(noisy.repeat(2, 1, 1, 1), network_times.repeat(2), conditions)
    conditional, free = both.chunk(2)
    return free + scale * (conditional - free)


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels from -1 to 1, [B, C, H, W], to uint8 [B, 3, H, W]; grey becomes three equal channels."""
    images = ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@torch.no_grad()
def images(
    denoiser: Denoiser,
    table: ConditionTable,
    sampler: Sampler,
    rows: Sequence[int],
    seeds: Sequence[int],
    decode: Decode = to_bytes,
) -> Iterator[Tensor]:
    """Generate samples as `samples` does, and decode them to uint8 [B, 3, H', W'] on the CPU."""
    done = 0
    report("images", done, len(rows))
    for drawn in samples(denoiser, table, sampler, rows, seeds):
        yield decode(drawn).cpu()
        done += len(drawn)
        report("images", done, len(rows))
