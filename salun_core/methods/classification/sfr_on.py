"""SFR-on: salient forget steps of weighted ascent, each followed by steps on the retain set.

    saliency       m = 1(F_f >= γ F_r),    F the diagonal of the Fisher matrix of D_f and of D_r at θ_o
    forget step    θ <- θ - lr m ⊙ ∇_θ[-α_t Σ_i c_i ℓ_i / Σ_i c_i],    c_i = ℓ_i^-λ held constant,    i in a D_f batch
    retain steps   θ <- θ - lr ∇_θ ℓ_r,    `forget_every` of them
    slow update    θ <- θ_s + β (θ - θ_s),    θ_s the weights before the round

γ is `saliency_ratio`, λ is `adaptive_power`, β is `slow_rate`. α_t falls from `forget_strength` as a cosine over the
run. β is 1 by default, as in the authors' classification code, so there is no slow update. Only the forget gradient is
masked: retain steps, momentum and weight decay change every weight. A sample whose loss is below the resolution of
float32 has no gradient, and its c is 0.

Source: Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024
(adaptive coefficients, forget-remain balanced saliency, fast-slow updates). Deviations: docs/research/deviations.md,
row `sfr_on`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy as sample_losses

from salun_core.data.images import ImageSource
from salun_core.methods.classification.method import (
    ClassifierContext,
    ClassifierMethod,
    batches_of,
    classification_loss,
    cross_entropy,
    cycled,
    cycled_count,
    share_step,
    shares,
)
from salun_core.methods.config import DrawingConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup, Share
from salun_core.methods.loop import Phase, Step
from salun_core.saliency.scores import scoring

_EPSILON = 1e-15  # keeps 0 / 0 and 0 >= 0 defined: unused weights are salient
_RESOLUTION = torch.finfo(torch.float32).eps  # a float32 loss below it is rounding: log(1 + x) knows no smaller x


class SfrOnConfig(DrawingConfig):
    """Settings of the rounds and of the saliency."""

    forget_every: int = Field(default=5, ge=1, description="retain steps after each forget step")
    forget_strength: float = Field(
        default=25.0, gt=0, allow_inf_nan=False, description="α of the first forget step; it falls as a cosine"
    )
    adaptive_power: float = Field(
        default=0.5, ge=0, allow_inf_nan=False, description="λ; samples count by their loss to the power -λ"
    )
    saliency_ratio: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="γ, least ratio of forget to retain Fisher"
    )
    slow_rate: float = Field(
        default=1.0, gt=0, le=1, description="β, how far the weights follow each round of fast steps"
    )


def fisher_diagonal(model: nn.Module, images: ImageSource, batch_size: int) -> dict[str, Tensor]:
    """Return F by parameter name: squared gradients of summed batch losses, divided by the number of images.

    This estimates the diagonal if the gradients of single images are independent with mean 0; a batch size of 1 gives
    the diagonal itself. The model is in eval mode.
    """
    squares = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
    for inputs, labels in images.batches(batch_size):
        model.zero_grad(set_to_none=True)
        (cross_entropy(model(inputs), labels) * len(labels)).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / len(images))
    return squares


def begin(context: ClassifierContext[SfrOnConfig]) -> ClassifierContext[SfrOnConfig]:
    """Return the context with the saliency m of θ_o, which is constant during the run; F_r is of one draw of D_r."""
    config, model = context.config, context.model
    assert model is not None
    drawn = context.drawn(torch.Generator().manual_seed(config.seed)).retain
    with scoring(model):
        f_f = fisher_diagonal(model, context.forget, config.batch_size)
        f_r = fisher_diagonal(model, drawn, config.batch_size)
    gamma = config.saliency_ratio
    return replace(context, salient={name: f_f[name] + _EPSILON >= gamma * (f_r[name] + _EPSILON) for name in f_f})


def adaptive_ascent(logits: Tensor, labels: Tensor, power: float, group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Return -Σ c ℓ / Σ c; `power` is λ, and each process of the group gets its own summand.

    A sample that the model is sure of has a loss of 0 in float32, and no gradient. If it counted with the weight that
    the equation gives a vanishing loss, its weight alone would be Σ c, and the rest of the batch would not move. So its
    weight is 0. A batch of such samples gives 0.
    """
    losses = sample_losses(logits, labels, reduction="none")
    weights = losses.detach().clamp_min(_RESOLUTION) ** -power * (losses.detach() >= _RESOLUTION)
    total = group.total(weights.sum())
    return -(weights / torch.where(total > 0, total, 1.0) * losses).sum()


def _forget_loss(
    context: ClassifierContext[SfrOnConfig], share: Share, alpha: float, group: ProcessGroup, model: nn.Module
) -> Tensor:
    """Return the loss of a forget step; detached copies of the other weights apply m to the gradient."""
    weights = {
        name: torch.where(context.salient[name], parameter, parameter.detach())
        for name, parameter in model.named_parameters()
    }
    logits = functional_call(model, weights, (share.images,))[: share.count]
    return alpha * adaptive_ascent(logits, share.labels[: share.count], context.config.adaptive_power, group)


@torch.no_grad()
def _slow_update(model: nn.Module, slow: Sequence[Tensor], beta: float) -> None:
    for parameter, before in zip(model.parameters(), slow, strict=True):
        parameter.copy_(torch.lerp(before, parameter, beta))


def phases(context: ClassifierContext[SfrOnConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: every retain image once, with a forget step before each `forget_every` retain steps."""
    model, config, retain = context.model, context.config, context.retain
    retain_steps = batches_of(retain, config)
    steps = retain_steps + -(-retain_steps // config.forget_every)

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        assert model is not None
        kept, gone = shares(retain, config, generator, group), cycled(context.forget, config, generator, group)
        for done in range(0, steps, config.forget_every + 1):
            slow = [parameter.detach().clone() for parameter in model.parameters()] if config.slow_rate < 1 else None
            progress = (context.epoch + done / steps) / config.epochs
            alpha = config.forget_strength * 0.5 * (1 + math.cos(math.pi * progress))
            yield Step(partial(_forget_loss, context, next(gone), alpha, group), 0, 1.0)
            for share in islice(kept, config.forget_every):
                yield share_step(classification_loss, share)
            if slow is not None:  # the optimizer has taken the last step of the round
                _slow_update(model, slow, config.slow_rate)

    return [Phase("retain", retain.labels.device, len(retain), steps, draw)]


def passes(context: ClassifierContext[SfrOnConfig]) -> float:
    """Return the cost in image passes: both sets for m, then D_r and its forget batches in each epoch."""
    config, retained = context.config, context.retain_count
    batches = -(-batches_of(retained, config) // config.forget_every)
    forget_images = cycled_count(context.forget, config, batches)
    return len(context.forget) + retained + config.epochs * (retained + forget_images)


METHOD = ClassifierMethod(
    phases,
    config_type=SfrOnConfig,
    about="salient ascent on D_f between repairs on D_r",
    source='Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024',
    defaults={"schedule": "cosine", "gradient_clip": 7.0},
    needs="two vectors",
    search={"forget_strength": (2.5, 250.0, True)},
    begin=begin,
    passes=passes,
)
