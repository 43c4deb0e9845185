"""Retrain: train fresh weights on the retain set alone, which is exact unlearning; for small models.

    min_θ  E||ε - ε_θ(x_t | c_r)||²  over D_r,    starting at fresh weights; c_r is the null condition once in ten

The defaults are those of the small base models (`examples/small_diffusion`).

Source: Fan et al., "SalUn", ICLR 2024; Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from salun_core.diffusion.examples import Noised
from salun_core.errors import UsageError
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod
from salun_core.methods.diffusion.objectives import denoising_loss_with_drop


def loss(context: DiffusionContext[DiffusionConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the denoising loss of the retain batch with a tenth of its conditions dropped.

    `UsageError` if `selection` covers only part of the network: the rest would stay random.
    """
    if context.config.selection != "full":
        raise UsageError(
            f"retrain cannot train {context.config.selection} alone",
            "the other weights are fresh and would stay random",
            "leave selection at full",
        )
    return denoising_loss_with_drop(context.denoiser, retain, context.sets.table, context.generator)


METHOD = DiffusionMethod(
    loss,
    about="trains fresh weights on D_r: exact",
    source='Fan et al.; dropped conditions: Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022',
    needs="time",
    needs_forget=False,
    fresh_start=True,
    defaults={
        "steps": 960,
        "null_share": 0.0,  # the loss drops conditions itself
        "epochs": 8,
        "batch_size": 64,
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
        "schedule": "cosine",
    },
)
