"""Gradient ascent (GA): increase the denoising loss of the forget set.

    max_θ  E||ε - ε_θ(x_t | c)||²  over D_f,    starting at θ_o

The loss has no upper bound: a small rate, few steps and a clipped gradient protect the other classes.

Source: Graves et al., "Amnesiac Machine Learning", AAAI 2021; Thudi et al., 2022; as the baseline of Fan et al.,
ICLR 2024.
"""

from __future__ import annotations

from torch import Tensor

from salun_core.diffusion.examples import Noised
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod
from salun_core.methods.diffusion.objectives import denoising_loss


def loss(context: DiffusionContext[DiffusionConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the negated denoising loss of the forget batch."""
    return -denoising_loss(context.denoiser, forget, context.sets.table)


METHOD = DiffusionMethod(
    loss,
    about="ascends the denoising loss of D_f",
    source="Graves et al., AAAI 2021; Thudi et al., 2022",
    shardable=True,
    needs_retain=False,
    defaults={"steps": 50, "learning_rate": 1e-5},
)
