"""SFR-on: salient forgetting steps of weighted ascent, each followed by steps that repair the retain set.

    forget step    θ <- θ - lr m ⊙ ∇_θ[-α_t Σ_i c_i ℓ_i / Σ_i c_i],    c_i = ℓ_i^-λ held constant,    i in a D_f batch
    retain steps   θ <- θ - lr ∇_θ ℓ_r,    `forget_every` of them
    slow update    θ <- θ_s + β (θ - θ_s),    θ_s the weights before the round
    saliency       m = 1(F_f >= γ F_r),    F the diagonal of the Fisher matrix of D_f and of D_r at θ_o

Source: Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024
(adaptive coefficients, forget-remain balanced saliency, fast-slow updates). α_t falls as a cosine over the run. β is 1
by default, as in the authors' classification code: then there is no slow update.
Simplifications: an epoch is one pass over D_r, not a number of steps; the mask is of the original and is not renewed;
F sums the squares of whole batches' gradients, divided by the number of samples, which estimates the diagonal where
samples' gradients are independent and have mean 0; the gradient is clipped in every step. Only the forget gradient is
masked: retain steps, momentum and weight decay move every weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy as sample_losses

from salun_core.data.images import ImageSet
from salun_core.methods.classification.method import (
    Method,
    MethodContext,
    batches_of,
    classification_loss,
    cross_entropy,
    cycled,
    cycled_count,
)
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup, Share
from salun_core.methods.loop import Phase, Step
from salun_core.saliency.scores import scoring

_LEAST = 1e-15


def fisher_diagonal(model: nn.Module, images: ImageSet, batch_size: int) -> dict[str, Tensor]:
    """Return the mean over images of squared gradients, by parameter name; batches stand in for single images.

    Args:
        model: in eval mode, every gradient asked for.
        images: D_f or D_r with true labels.
        batch_size: 1 gives the empirical Fisher diagonal itself.
    """
    squares = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
    for inputs, labels in images.batches(batch_size):
        model.zero_grad(set_to_none=True)
        (cross_entropy(model(inputs), labels) * len(labels)).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / len(images))
    return squares


def begin(context: MethodContext) -> MethodContext:
    """Return the context with the saliency mask of the model before its first step."""
    assert context.model is not None
    with scoring(context.model):
        forget = fisher_diagonal(context.model, context.forget, context.config.batch_size)
        retain = fisher_diagonal(context.model, context.retain, context.config.batch_size)
    ratio = context.config.saliency_ratio
    return replace(context, salient={name: forget[name] + _LEAST >= ratio * (retain[name] + _LEAST) for name in forget})


def adaptive_ascent(logits: Tensor, labels: Tensor, power: float, group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Negated mean of the losses, each weighted by its own value to the power -λ.

    Args:
        logits: [B, K].
        labels: int64 [B].
        power: λ.
        group: this process; where several share a batch, each gets its summand of the batch's mean.
    """
    losses = sample_losses(logits, labels, reduction="none")
    weights = 1 / (losses.detach() ** power + _LEAST)
    return -(weights / group.total(weights.sum()) * losses).sum()


def phases(context: MethodContext, generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: every retain image once, with a forget batch before each `forget_every` retain batches."""
    model, config, retain = context.model, context.config, context.retain
    retain_steps = batches_of(retain, config)
    steps = retain_steps + -(-retain_steps // config.forget_every)

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        assert model is not None
        retained = retain.batches(config.batch_size, generator, config.augment)
        forgotten = cycled(context.forget, config, generator)
        for done in range(0, steps, config.forget_every + 1):
            slow = [parameter.detach().clone() for parameter in model.parameters()] if config.slow_rate < 1 else []
            progress = (context.epoch + done / steps) / config.epochs
            strength = config.forget_strength * 0.5 * (1 + math.cos(math.pi * progress))
            yield Step(partial(_forget_loss, context, group.share(*next(forgotten)), strength, group), 0, 1.0)
            for images, labels in islice(retained, config.forget_every):
                share = group.share(images, labels)
                yield Step(partial(_retain_loss, share), share.count, share.weight)
            _pull_back(model, slow, config.slow_rate)  # after the optimiser has taken the last step of the round

    return [Phase("retain", retain.labels.device, len(retain), steps, draw)]


def _forget_loss(
    context: MethodContext, share: Share, strength: float, group: ProcessGroup, model: nn.Module
) -> Tensor:
    """Only salient weights get a gradient: the others are constants here."""
    weights = {
        name: torch.where(context.salient[name], parameter, parameter.detach())
        for name, parameter in model.named_parameters()
    }
    logits = functional_call(model, weights, (share.images,))[: share.count]
    return strength * adaptive_ascent(logits, share.labels[: share.count], context.config.adaptive_power, group)


def _retain_loss(share: Share, model: nn.Module) -> Tensor:
    return classification_loss(model, share.images, share.labels)


@torch.no_grad()
def _pull_back(model: nn.Module, slow: Sequence[Tensor], rate: float) -> None:
    if slow:
        for parameter, before in zip(model.parameters(), slow, strict=True):
            parameter.copy_(torch.lerp(before, parameter, rate))


def passes(context: MethodContext) -> float:
    """Return images forward and backward: the mask over both sets, then D_r and its forget batches each epoch."""
    config = context.config
    batches = -(-batches_of(context.retain, config) // config.forget_every)
    forgotten = cycled_count(context.forget, config, batches)
    return len(context.forget) + len(context.retain) + config.epochs * (len(context.retain) + forgotten)


METHOD = Method(
    phases,
    defaults={"schedule": "cosine", "gradient_clip": 7.0},
    reads=frozenset({"forget_every", "forget_strength", "adaptive_power", "saliency_ratio", "slow_rate"}),
    begin=begin,
    passes=passes,
)
