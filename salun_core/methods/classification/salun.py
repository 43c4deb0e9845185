"""SalUn: random labelling that moves salient weights only.

    θ_u = m ⊙ (Δθ + θ_o) + (1 - m) ⊙ θ_o,    Δθ from random labelling,    m = 1(|∇_θ ℓ_f(θ_o; D_f)| >= γ)

The optimizer step applies m (`salun_core.saliency.masked_optimizer`), so weights outside it stay bit-identical.

Source: Fan et al., "SalUn", ICLR 2024, equations (3) to (5). Deviations: docs/research/deviations.md, in all methods.
"""

from __future__ import annotations

from salun_core.methods.classification import adaptive, random_label
from salun_core.methods.classification.method import DRAWS_RETAIN, ClassifierMethod

METHOD = ClassifierMethod(
    random_label.phases, needs_mask=True, adaptive=adaptive.DEFAULTS, reads=DRAWS_RETAIN, shardable=True
)
