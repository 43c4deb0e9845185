"""Random labelling (RL): predict as under other conditions on the forget set, and as before on the retain set.

    min_θ  E||ε_θ(x_t | c') - ε_θ(x_t | c)||² + α E||ε - ε_θ(x_t | c_r)||²

Source: Fan et al., "SalUn", ICLR 2024, equation (7) without its mask.
"""

from __future__ import annotations

from salun_core.methods.diffusion.method import DiffusionMethod
from salun_core.methods.diffusion.objectives import relabel_loss, relabel_passes

METHOD = DiffusionMethod(
    relabel_loss,
    about="predicts D_f as under other conditions, D_r as before",
    source='Fan et al., "SalUn", ICLR 2024, equation (7) without its mask',
    shardable=True,
    passes=relabel_passes,
)
