"""SalUn for diffusion models: random labelling that moves salient weights only.

    θ_u = m ⊙ (Δθ + θ_o) + (1 - m) ⊙ θ_o,    m = 1(|∇_θ E||ε - ε_θ(x_t | c)||²| >= γ) over D_f at θ_o

Source: Fan et al., "SalUn", ICLR 2024, equations (3), (6) and (7).
"""

from __future__ import annotations

from salun_core.methods.diffusion.method import DiffusionMethod
from salun_core.methods.diffusion.objectives import relabel_loss, relabel_passes

METHOD = DiffusionMethod(
    relabel_loss,
    about="as `random_label`, salient weights only",
    source='Fan et al., "SalUn", ICLR 2024, equations (3), (6), (7)',
    shardable=True,
    needs_mask=True,
    passes=relabel_passes,
)
