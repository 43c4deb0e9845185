"""SCRUB: move away from the original's outputs on the forget set, and stay near them on the retain set.

    min_θ  E_{(x, y) in D_r} [α d(x; θ) + γ CE(f_θ(x), y)]  -  E_{x in D_f} d(x; θ)
    d(x; θ) = T² KL(softmax(f_θo(x) / T) || softmax(f_θ(x) / T)),    θ_o frozen

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023. The first `ascent_epochs` epochs begin
with one pass of ascent over D_f; every epoch ends with one of descent over D_r.
At θ = θ_o the divergence has no slope. What breaks the tie is that θ sees batch statistics and θ_o its running ones,
so batch norm is updated by default; without batch norm or dropout the first ascent moves by weight decay alone.
The authors' rewinding ("SCRUB+R") and their use of two batch sizes are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from salun_core.methods.classification.method import Method, MethodContext, cross_entropy
from salun_core.methods.loop import Phase


def divergence(logits: Tensor, original: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of T² KL(original || new).

    Args:
        logits: of the new model, [B, K].
        original: of the frozen one, [B, K].
        temperature: T.
    """
    new = torch.log_softmax(logits / temperature, dim=1)
    old = torch.log_softmax(original / temperature, dim=1)
    return torch.nn.functional.kl_div(new, old, reduction="batchmean", log_target=True) * temperature**2


def _divergence(context: MethodContext, logits: Tensor, images: Tensor) -> Tensor:
    assert context.original is not None
    with torch.no_grad():
        original = context.original(images)
    return divergence(logits, original, context.config.temperature)


def ascent(context: MethodContext, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Negated divergence from the original."""
    return -_divergence(context, model(images), images)


def descent(context: MethodContext, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and divergence, weighted."""
    logits = model(images)
    kept = context.config.distillation_weight * _divergence(context, logits, images)
    return kept + context.config.label_weight * cross_entropy(logits, labels)


def phases(context: MethodContext, generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: ascent on D_f where its time is not over, then descent on D_r."""
    retain = context.phase("retain", context.retain, partial(descent, context))
    if context.epoch >= context.config.ascent_epochs:
        return [retain]
    return [context.phase("forget", context.forget, partial(ascent, context)), retain]


def passes(context: MethodContext) -> float:
    """Return images forward and backward, and a third for each that the original sees."""
    ascents = min(context.config.ascent_epochs, context.config.epochs)
    return (ascents * len(context.forget) + context.config.epochs * len(context.retain)) * 4 / 3


METHOD = Method(
    phases,
    defaults={"batch_norm": "update"},
    reads=frozenset({"ascent_epochs", "distillation_weight", "label_weight", "temperature"}),
    needs_original=True,
    passes=passes,
)
