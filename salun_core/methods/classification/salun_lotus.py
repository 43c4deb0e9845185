"""SalUn with the objective of LoTUS: targets from the original's tempered outputs, salient weights only.

    θ_u = m ⊙ θ + (1 - m) ⊙ θ_o,    θ from LoTUS (`lotus`),    m = 1(|∇_θ ℓ_f(θ_o; D_f)| >= γ)

The wrong labels of random labelling contradict the model on every image of D_f. The tempered outputs of the original do
so only where the original is unsure. The optimizer step applies m, so weights outside it stay bit-identical.

Source: Spartalis et al., CVPR 2025 (SalUn as a mask for LoTUS), and Fan et al., "SalUn", ICLR 2024. Deviations:
docs/research/deviations.md, rows `lotus` and `salun_lotus`.
"""

from __future__ import annotations

from dataclasses import replace

from salun_core.methods.classification import lotus

# Frozen batch norm, as for SalUn: running statistics of D_f would be a change that the mask does not bound.
METHOD = replace(
    lotus.METHOD,
    about="as `lotus`, salient weights only",
    source="Spartalis et al., CVPR 2025, and Fan et al., ICLR 2024",
    needs_mask=True,
    defaults={**lotus.METHOD.defaults, "batch_norm": "freeze"},
)
