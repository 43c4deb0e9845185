"""Draws images from a denoiser: one batch after the other, each image from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salun_core.diffusion.conditions import Conditions, ConditionTable
from salun_core.diffusion.denoiser import Denoiser, require_finite

Decode = Callable[[Tensor], Tensor]
"""Latents or pixels [B, C, H, W] -> images uint8 [B, 3, H', W']."""


@dataclass(frozen=True)
class Sampler:
    """How images are drawn.

    Args:
        scheduler: one of diffusers', by the sampler's own steps; it is copied for each batch.
        shape: of one sample, (C, H, W).
        steps: of denoising.
        guidance_scale: w + 1 of classifier-free guidance; 1 asks the network once a step.
        batch_size: images that go through the network together.
    """

    scheduler: Any
    shape: tuple[int, int, int]
    steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 64

    @classmethod
    def of_scheduler(cls, scheduler: Any, shape: tuple[int, int, int], **settings: Any) -> Sampler:  # noqa: ANN401
        """Make the deterministic sampler of a process: DDIM without noise, or Euler steps for flows.

        Args:
            scheduler: the model's own.
            shape: of one sample, (C, H, W).
            settings: steps, guidance_scale, batch_size.
        """
        from diffusers import DDIMScheduler

        if "FlowMatch" in type(scheduler).__name__:
            return cls(type(scheduler).from_config(scheduler.config), shape, **settings)
        made = DDIMScheduler.from_config(scheduler.config)  # type: ignore[no-untyped-call]
        return cls(made, shape, **settings)

    @property
    def name(self) -> str:
        """Class of the scheduler."""
        return type(self.scheduler).__name__


def starting_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return the noise of each seed, float32 [B, *shape]: the same in every batch and on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def samples(
    denoiser: Denoiser, table: ConditionTable, sampler: Sampler, rows: Sequence[int], seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Draw samples, batch after batch; memory does not grow with their number or with the steps.

    Args:
        denoiser: in eval mode afterwards.
        table: conditions, on the denoiser's device.
        sampler: how.
        rows: the condition of each sample.
        seeds: of each sample.

    Yields:
        Latents or pixels, float32 [B, C, H, W], in order.

    Raises:
        ModelError: a sample is NaN or infinite.
    """
    denoiser.network.eval()
    device = next(denoiser.network.parameters()).device
    for start in range(0, len(rows), sampler.batch_size):
        part = slice(start, start + sampler.batch_size)
        noise = starting_noise(seeds[part], sampler.shape).to(device)
        drawn = _denoised(denoiser, table, sampler, torch.tensor(rows[part], dtype=torch.int64), noise)
        yield require_finite("generated images", drawn)


def _denoised(denoiser: Denoiser, table: ConditionTable, sampler: Sampler, rows: Tensor, noise: Tensor) -> Tensor:
    scheduler = type(sampler.scheduler).from_config(sampler.scheduler.config)
    scheduler.set_timesteps(sampler.steps)
    told = guidance_conditions(table, rows, sampler.guidance_scale)
    current = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for moment in scheduler.timesteps:
        predicted = guided_prediction(denoiser, current, moment, told, sampler.guidance_scale)
        current = scheduler.step(predicted, moment, current, return_dict=False)[0]
    return current


def guidance_conditions(table: ConditionTable, rows: Tensor, scale: float) -> Conditions:
    """Return what the network is told in one call: the conditions, and the null condition after them if it guides."""
    told = table.take(rows)
    if scale == 1:
        return told
    free = table.nulls(len(rows))
    return {name: torch.cat([told[name], free[name]]) for name in told}


def guided_prediction(denoiser: Denoiser, noisy: Tensor, moment: Tensor, told: Conditions, scale: float) -> Tensor:
    """Ask the network at a scheduler's own time, with guidance (see `objectives.guided`).

    Args:
        denoiser: the network.
        noisy: x_t [B, C, H, W].
        moment: a scheduler's time, a scalar; of a flow 1000 σ.
        told: from `guidance_conditions`.
        scale: of the guidance.
    """
    double = 1 if scale == 1 else 2
    times = moment.to(noisy.device).expand(double * len(noisy))
    found = denoiser.ask(noisy.repeat(double, 1, 1, 1), times, told)
    if double == 1:
        return found
    conditional, free = found.chunk(2)
    return free + scale * (conditional - free)


def to_bytes(pixels: Tensor) -> Tensor:
    """Turn pixels from -1 to 1, [B, C, H, W], into uint8 [B, 3, H, W]; one channel becomes three."""
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
    """Draw images as `samples` does, decoded to uint8 [B, 3, H', W'] on the CPU."""
    for drawn in samples(denoiser, table, sampler, rows, seeds):
        yield decode(drawn).cpu()
