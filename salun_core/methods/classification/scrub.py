"""SCRUB: move away from the original's outputs on the forget set, and stay near them on the retain set.

    max steps    max_θ  E_{x in D_f} d(x; θ)
    min steps    min_θ  E_{(x, y) in D_r} [α d(x; θ) + γ CE(f_θ(x), y)]
    d(x; θ) = T² KL(softmax(f_θo(x) / T) || softmax(f_θ(x) / T)),    θ_o frozen

α is `distillation_weight`, γ is `label_weight`, T is `temperature`. Each of the first `ascent_epochs` epochs begins
with max steps over D_f; every epoch ends with min steps over D_r.

At θ = θ_o the divergence has zero gradient. Batch norm breaks the tie: θ uses batch statistics, θ_o running ones. So
batch norm is updated by default; without batch norm or dropout, only weight decay acts in the first max steps.

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023. Deviations: docs/research/deviations.md,
row `scrub`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, cross_entropy
from salun_core.methods.config import DrawingConfig
from salun_core.methods.loop import Phase


class ScrubConfig(DrawingConfig):
    """Length of the ascent, and the weights of the losses."""

    ascent_epochs: int = Field(default=2, ge=1, description="epochs that begin with ascent on the forget set")
    distillation_weight: float = Field(
        default=0.5,
        ge=0,
        allow_inf_nan=False,
        description="α, of the divergence from the original on the retain set",
    )
    label_weight: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="γ, of the cross-entropy on the retain set"
    )
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="T, that divides all logits")


def divergence(logits: Tensor, original: Tensor, temperature: float) -> Tensor:
    """Return d of logits [B, K], averaged over the batch."""
    new = torch.log_softmax(logits / temperature, dim=1)
    old = torch.log_softmax(original / temperature, dim=1)
    return torch.nn.functional.kl_div(new, old, reduction="batchmean", log_target=True) * temperature**2


def _from_original(context: ClassifierContext[ScrubConfig], logits: Tensor, images: Tensor) -> Tensor:
    assert context.original is not None
    with torch.no_grad():
        original = context.original(images)
    return divergence(logits, original, context.config.temperature)


def max_loss(context: ClassifierContext[ScrubConfig], model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return -d on a forget batch."""
    return -_from_original(context, model(images), images)


def min_loss(context: ClassifierContext[ScrubConfig], model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return α d + γ CE on a retain batch."""
    logits = model(images)
    alpha, gamma = context.config.distillation_weight, context.config.label_weight
    return alpha * _from_original(context, logits, images) + gamma * cross_entropy(logits, labels)


def phases(context: ClassifierContext[ScrubConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: max steps over D_f in the first epochs, then min steps over D_r."""
    forget = context.phase("forget", context.forget, partial(max_loss, context))
    retain = context.phase("retain", context.retain, partial(min_loss, context))
    return [forget, retain] if context.epoch < context.config.ascent_epochs else [retain]


def passes(context: ClassifierContext[ScrubConfig]) -> float:
    """Return the cost in image passes; each forward pass of the original counts a third."""
    ascents = min(context.config.ascent_epochs, context.config.epochs)
    return (ascents * len(context.forget) + context.config.epochs * context.retain_count) * 4 / 3


METHOD = ClassifierMethod(
    phases,
    config_type=ScrubConfig,
    about="moves away from θ_o's outputs on D_f, stays close to them on D_r",
    source='Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023',
    defaults={"batch_norm": "update"},
    needs_original=True,
    grows=True,
    shardable=True,
    passes=passes,
)
