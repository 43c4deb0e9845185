"""SalUn: random labelling that moves salient weights only.

    θ_u = m ⊙ (Δθ + θ_o) + (1 - m) ⊙ θ_o,    Δθ from random labelling,    m = 1(|∇_θ ℓ_f(θ_o; D_f)| >= γ)

The optimizer step applies m (`salun_core.saliency.masked_optimizer`), so weights outside it stay bit-identical.

Source: Fan et al., "SalUn", ICLR 2024, equations (3) to (5). Deviations: docs/research/deviations.md, in all methods.
"""

from __future__ import annotations

from dataclasses import replace

from salun_core.methods.classification import random_label

METHOD = replace(
    random_label.METHOD,
    about="as `random_label`, salient weights only",
    source='Fan et al., "SalUn", ICLR 2024, equations (3) to (5)',
    needs_mask=True,
)
