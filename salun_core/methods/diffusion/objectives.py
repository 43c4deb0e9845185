"""The losses of the diffusion methods. All use the same reduction, the mean over all elements."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Noised
from salun_core.diffusion.sampling import guidance_conditions, guided_prediction
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionContext


def denoising_loss(denoiser: Denoiser, batch: Noised, table: ConditionTable) -> Tensor:
    """Mean squared error of the prediction under its own condition: E||ε - ε_θ(x_t | c)||² (SalUn, eq. 6)."""
    return mse_loss(denoiser.predict(batch.noisy, batch.times, table.take(batch.condition)), batch.target)


def denoising_loss_with_drop(
    denoiser: Denoiser, batch: Noised, table: ConditionTable, generator: torch.Generator, share: float = 0.1
) -> Tensor:
    """`denoising_loss` with a share of the conditions dropped, so that the network learns the null condition too.

    Without a null condition nothing is dropped. The generator is on the CPU.

    Source:
        Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, algorithm 1.
    """
    if table.null is None:
        return denoising_loss(denoiser, batch, table)
    dropped = (torch.rand(len(batch), generator=generator) < share).to(batch.condition.device)
    return denoising_loss(denoiser, replace(batch, condition=batch.condition.masked_fill(dropped, table.null)), table)


def retain_weight(context: DiffusionContext[DiffusionConfig]) -> float:
    """Return α for a forget and a retain loss that are both means over all elements.

    The published DDPM code sums the retain loss over pixels and averages the forget loss: its α of 1e-3 equals
    1e-3 x C x H x W here (docs/research/diffusion-methods.md, "The scale of alpha").
    """
    config, shape = context.config, context.sets.retain.mean.shape[1:]
    if config.alpha_convention == "reference" and context.sets.pixels:
        return config.alpha * float(torch.Size(shape).numel())
    return config.alpha


def relabel_loss(context: DiffusionContext[DiffusionConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the loss of random labelling (SalUn, eq. 7).

        E||ε_θ(x_t | c') - ε_θ(x_t | c)||² + α E||ε - ε_θ(x_t | c_r)||²,    the first ε_θ a constant

    One forward pass serves both predictions that need gradients; the target is computed without gradients.
    """
    denoiser, table = context.denoiser, context.sets.table
    assert forget.pseudo is not None
    with torch.no_grad():
        target = denoiser.predict(forget.noisy, forget.times, table.take(forget.pseudo))
    predicted = denoiser.predict(
        torch.cat([forget.noisy, retain.noisy]),
        torch.cat([forget.times, retain.times]),
        table.take(torch.cat([forget.condition, retain.condition])),
    )
    loss_f = mse_loss(predicted[: len(forget)], target)
    loss_r = mse_loss(predicted[len(forget) :], retain.target)
    return loss_f + retain_weight(context) * loss_r


def relabel_passes(config: DiffusionConfig) -> float:
    """Return the cost of random labelling in passes: each pair of examples, and the target of the forget example."""
    return config.steps * config.batch_size * (2 + 1 / 3)


def guided(denoiser: Denoiser, batch: Noised, table: ConditionTable, scale: float) -> Tensor:
    """Return the prediction for a batch under classifier-free guidance; see `sampling.guided_prediction`."""
    times = denoiser.process.network_times(batch.times)
    conditions = guidance_conditions(table, batch.condition, scale)
    return guided_prediction(denoiser, batch.noisy, times, conditions, scale)
