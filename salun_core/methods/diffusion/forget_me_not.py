"""Forget-Me-Not (FMN): reduce the attention to the concept's tokens.

    min_θ  mean over cross-attention layers of  E (A_θ[·, tokens of c])²  over D_f,    A = softmax(Q K^T / √d)

This is the published attention re-steering. It omits the optional textual inversion, because concepts here have
names. `ConditionTable.tokens` holds the tokens of the concept. The paper minimises the norm. This loss is its square
as a mean over all elements, like every loss of this package.

Source: Zhang et al., "Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Noised
from salun_core.errors import UsageError
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionContext, DiffusionMethod


def loss(context: DiffusionContext[DiffusionConfig], forget: Noised, retain: Noised) -> Tensor:
    """Return the mean squared attention of the forget batch to the tokens of its concept.

    `UsageError` if the network has no cross-attention, or gradient checkpointing is on.
    """
    if context.config.gradient_checkpointing:
        raise UsageError(
            "forget_me_not cannot work with gradient checkpointing",
            "it reads attention, which would be computed twice",
            "set gradient_checkpointing: false",
        )
    table = context.sets.table
    with attention_maps(context.denoiser) as maps:
        context.denoiser.predict(forget.noisy, forget.times, table.take(forget.condition))
    marks = table.own_tokens()[forget.condition.cpu()].to(forget.noisy.device)
    return torch.stack([attention_energy(found, marks) for found in maps]).mean()


def attention_energy(probabilities: Tensor, marks: Tensor) -> Tensor:
    """Return the mean square of the probabilities [B, heads, queries, L] that `marks`, bool [B, L], selects."""
    chosen = marks[:, None, None, :].expand_as(probabilities)
    return probabilities.square()[chosen].mean()


@contextmanager
def attention_maps(denoiser: Denoiser) -> Iterator[list[Tensor]]:
    """Collect the attention of each cross-attention layer during forward passes; the network does not change.

    The list grows by [B, heads, queries, L] per layer. `UsageError` if the network has no cross-attention.
    """
    found: list[Tensor] = []

    def keep(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ANN401
        image = args[0] if args else named["hidden_states"]
        found.append(_probabilities(layer, image, named["encoder_hidden_states"], named.get("attention_mask")))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in denoiser.cross_attentions().values()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _probabilities(layer: Any, image: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ANN401
    """Recompute the attention of a diffusers layer, because its fused kernel does not return it."""
    if layer.norm_cross:
        text = layer.norm_encoder_hidden_states(text)
    query, key = (layer.head_to_batch_dim(part) for part in (layer.to_q(image), layer.to_k(text)))
    mask = layer.prepare_attention_mask(mask, text.shape[1], len(text))
    scores: Tensor = layer.get_attention_scores(query, key, mask)
    return scores.view(len(text), layer.heads, *scores.shape[1:])


METHOD = DiffusionMethod(
    loss,
    about="reduces the attention to the concept's tokens",
    source='Zhang et al., "Forget-Me-Not", 2023; without its optional textual inversion',
    needs="cross-attention",
    needs_retain=False,
    defaults={"selection": "xattn", "steps": 50, "batch_size": 8, "learning_rate": 1e-5},
)
