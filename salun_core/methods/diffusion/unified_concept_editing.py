"""Unified Concept Editing (UCE): change the projections of the concept's tokens, in closed form.

    W = (Σ_e v*_e c_e^T + λ W_o + p Σ_k W_o c_k c_k^T) (Σ_e c_e c_e^T + λ I + p Σ_k c_k c_k^T)^-1,    v*_e = W_o c_a

for the key and value projections of every cross-attention layer. e runs over the forgotten conditions, a is the anchor
of each, k runs over all other conditions; λ is `edit_strength`, p is `preserve_strength`. Because v* is a projection
by W_o, W = W_o (I + D) with D = Σ_e (c_a - c_e) c_e^T (...)^-1: one system of equations serves all layers that read the
same text. Biases do not change.

Tokens of two prompts are matched from the last token of the concept, through end of text and padding, as far as the
longer prompt allows. If the tokens of the concept are unknown, they are matched from the second position.

Source: Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, the closed-form solution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.diffusion.denoiser import Denoiser
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionMethod, ExampleSets


class UceConfig(DiffusionConfig):
    """Weights of what stays; the settings of a training are not used."""

    edit_strength: float = Field(default=0.1, gt=0, allow_inf_nan=False, description="λ, of the old projection")
    preserve_strength: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="weight of what is kept")


@torch.no_grad()
def edit(denoiser: Denoiser, sets: ExampleSets, config: UceConfig) -> None:
    """Edit the network in place; only the key and value weights of cross-attention change.

    The batch size bounds the memory. A network without cross-attention is a `UsageError`.
    """
    for layers, (old, new, kept) in editable(denoiser, sets, config):
        change = correction(old, new, kept, config.edit_strength, config.preserve_strength)
        apply(layers, torch.eye(len(change), dtype=torch.float64) + change)


def editable(
    denoiser: Denoiser, sets: ExampleSets, config: UceConfig
) -> Iterator[tuple[list[nn.Linear], tuple[Tensor, Tensor, Tensor]]]:
    """Yield the key and value projections that read the same text, with its tokens as of `matched_tokens`.

    A network without cross-attention is a `UsageError`.
    """
    layers = projections(denoiser)
    for names, texts in _by_text(denoiser, sets, config.batch_size, layers):
        second = min(1, texts.shape[1] - 1)
        first = [max(own, default=second) for own in sets.table.tokens or [()] * len(texts)]
        yield [layers[name] for name in names], matched_tokens(texts, sets, first)


def apply(layers: Iterable[nn.Linear], change: Tensor) -> None:
    """Set W = W_o T in place; T is `change`, float64 [d, d], on the CPU."""
    for layer in layers:
        layer.weight.copy_(layer.weight.double().cpu() @ change)


def projections(denoiser: Denoiser) -> dict[str, nn.Linear]:
    """Return the key and value projections of every cross-attention layer by name."""
    found: dict[str, nn.Linear] = {}
    for name, layer in denoiser.cross_attentions().items():
        attention: Any = layer
        found |= {f"{name}.to_k": attention.to_k, f"{name}.to_v": attention.to_v}
    return found


def matched_tokens(texts: Tensor, sets: ExampleSets, first: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Match the tokens of the forgotten conditions with those of their anchors: c_e [n, d], c_a [n, d].

    The third value has the tokens to preserve [m, d]. `texts` [K, L, d] are the inputs of the projections, and `first`
    is the first matched position by row. Repeated pairs count once.
    """
    assert sets.forget.pseudo is not None
    length = texts.shape[1]
    pairs = sorted(set(zip(sets.forget.condition.tolist(), sets.forget.pseudo.tolist(), strict=True)))
    old, new = [], []
    for row, anchor in pairs:
        count = length - max(first[row], first[anchor])
        old.append(texts[row, first[row] : first[row] + count])
        new.append(texts[anchor, first[anchor] : first[anchor] + count])
    forgotten = {row for row, _ in pairs}
    kept = [texts[row, first[row] :] for row in range(len(texts)) if row not in forgotten]
    return torch.cat(old), torch.cat(new), torch.cat([texts[0, :0], *kept])


def correction(old: Tensor, new: Tensor, kept: Tensor, strength: float, preserve: float) -> Tensor:
    """Return D of W = W_o (I + D), float64 [d, d], on the CPU.

    `old` is c_e [n, d], `new` c_a [n, d], `kept` c_k [m, d], `strength` λ and `preserve` p.
    """
    old, new, kept = (tokens.double().cpu() for tokens in (old, new, kept))
    gram = old.T @ old + preserve * (kept.T @ kept) + strength * torch.eye(old.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, old.T @ (new - old)).T  # type: ignore[no-any-return]


def _by_text(
    denoiser: Denoiser, sets: ExampleSets, batch_size: int, layers: Mapping[str, nn.Linear]
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the names of projections that read the same text, with that text [K, L, d].

    Some networks project or normalise the text of the table first, so hooks record the inputs of the projections.
    """
    read: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0]))
        for name, layer in layers.items()
    ]
    try:
        for rows in torch.split(torch.arange(len(sets.table)), batch_size):
            noisy = sets.forget.mean.new_zeros((len(rows), *sets.forget.mean.shape[1:]))
            denoiser.predict(noisy, noisy.new_zeros(len(rows), dtype=torch.int64), sets.table.take(rows))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, parts in read.items():
        groups.setdefault(tuple(id(part) for part in parts), []).append(name)
    for names in groups.values():
        yield names, torch.cat(read[names[0]])


METHOD = DiffusionMethod(
    edit=edit,
    config_type=UceConfig,
    about="changes the projections of the concept's tokens, in closed form",
    source='Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024',
    needs="cross-attention",
)
