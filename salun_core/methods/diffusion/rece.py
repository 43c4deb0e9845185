"""Reliable and Efficient Concept Erasure (RECE): UCE that also erases the embeddings which bring the concept back.

    c'_e = argmin_c Σ_i |W_i c - W_o,i c_e|² + λ |c|² = (Σ_i W_i^T W_i + λ I)^-1 Σ_i W_i^T W_o,i c_e

i runs over the key and value projections of all cross-attention layers that read the same text, W are their weights
after the edits so far, W_o the original ones. UCE then edits W with c'_e in place of c_e. This repeats for
`adversarial_rounds` rounds; λ is `adversarial_strength`. A larger λ keeps c'_e short, which protects other prompts.

Because each edit is W = W_o T with one T for all i, both sums need only G = Σ_i W_o,i^T W_o,i:
c'_e = (T^T G T + λ I)^-1 T^T G c_e.

Source: Gong et al., "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models", ECCV 2024, the
derivation of target embeddings and the regularisation term. Deviations: docs/research/deviations.md, row `rece`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from salun_core.diffusion.denoiser import Denoiser
from salun_core.methods.diffusion.method import DiffusionMethod, ExampleSets
from salun_core.methods.diffusion.unified_concept_editing import UceConfig, apply, correction, editable


class ReceConfig(UceConfig):
    """UCE, and the adversarial embeddings."""

    adversarial_rounds: int = Field(
        default=3, ge=1, le=100, description="times that adversarial embeddings are found and erased"
    )
    adversarial_strength: float = Field(
        default=0.1, gt=0, allow_inf_nan=False, description="λ, which keeps these embeddings short"
    )


@torch.no_grad()
def edit(denoiser: Denoiser, sets: ExampleSets, config: ReceConfig) -> None:
    """Edit the network in place; only the key and value weights of cross-attention change.

    A network without cross-attention is a `UsageError`.
    """
    for layers, (old, new, kept) in editable(denoiser, sets, config):
        gram = gram_of(layer.weight for layer in layers)
        identity = torch.eye(len(gram), dtype=torch.float64)

        def edited(tokens: Tensor, new: Tensor = new, kept: Tensor = kept, identity: Tensor = identity) -> Tensor:
            return identity + correction(tokens, new, kept, config.edit_strength, config.preserve_strength)

        change = edited(old)
        for _ in range(config.adversarial_rounds):
            change = change @ edited(adversarial_tokens(old, change, gram, config.adversarial_strength))
        apply(layers, change)


def gram_of(weights: Iterable[Tensor]) -> Tensor:
    """Return G = Σ W^T W of weights [*, d], float64 [d, d], on the CPU."""
    return sum(
        (weight.double().cpu().T @ weight.double().cpu() for weight in weights), torch.zeros((), dtype=torch.float64)
    )


def adversarial_tokens(tokens: Tensor, change: Tensor, gram: Tensor, strength: float) -> Tensor:
    """Return c'_e, float64 [n, d]: the embeddings whose projections by W_o T are nearest to those of the tokens by W_o.

    `tokens` are c_e [n, d]; `change` is T and `gram` is G, float64 [d, d]; `strength` is λ.
    """
    system = change.T @ gram @ change + strength * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(system, change.T @ gram @ tokens.double().cpu().T).T  # type: ignore[no-any-return]


METHOD = DiffusionMethod(
    edit=edit,
    config_type=ReceConfig,
    about="`uce`, and again on the embeddings that bring the concept back",
    source='Gong et al., "Reliable and Efficient Concept Erasure", ECCV 2024',
    needs="cross-attention",
)
