"""Fine-tuning (FT): continue training on the retain set, so that the model may forget the rest.

    min_θ  E||ε - ε_θ(x_t | c_r)||²  over D_r,    starting at θ_o

Source: Warnecke et al., 2021; as the baseline of Fan et al., ICLR 2024.
"""

from __future__ import annotations

from torch import Tensor

from salun_core.diffusion.examples import Noised
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod
from salun_core.methods.diffusion.objectives import denoising_loss


def loss(context: DiffusionContext[DiffusionConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the denoising loss of the retain batch."""
    return denoising_loss(context.denoiser, retain, context.sets.table)


METHOD = DiffusionMethod(
    loss,
    about="continues training on D_r",
    source="Warnecke et al., 2021; baseline of Fan et al.",
    shardable=True,
    needs_forget=False,
)
