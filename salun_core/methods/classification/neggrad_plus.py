"""NegGrad+: decrease the loss of the retain set and increase that of the forget set in every step.

    min_θ  α E_{(x, y) in D_r} CE(f_θ(x), y)  -  (1 - α) E_{(x, y) in D_f} CE(f_θ(x), y)

α is `retain_weight`. An epoch is one pass over D_r. Each of its batches is paired with a batch of D_f, which repeats in
a new order. The gradient is clipped: the loss of D_f has no upper bound, and without clipping it destroys the other
classes.

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023 (their tuned form of NegGrad).
Deviations: docs/research/deviations.md, row `neggrad_plus`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.methods.classification.method import (
    ClassifierContext,
    ClassifierMethod,
    batches_of,
    classification_loss,
    cycled,
    cycled_count,
    shares,
)
from salun_core.methods.config import DrawingConfig
from salun_core.methods.distributed import ProcessGroup, Share
from salun_core.methods.loop import Phase, Step


class NegGradConfig(DrawingConfig):
    """How the losses of both sets are weighed."""

    retain_weight: float = Field(
        default=0.95, gt=0, lt=1, description="α, of the retain loss; the forget loss has 1 - α"
    )


def loss(alpha: float, retain: Share, forget: Share, model: nn.Module) -> Tensor:
    """Return this process's part of the loss of one pair of batches."""
    loss_r = classification_loss(model, retain.images, retain.labels) * retain.weight
    loss_f = classification_loss(model, forget.images, forget.labels) * forget.weight
    return alpha * loss_r - (1 - alpha) * loss_f


def _step(alpha: float, retain: Share, forget: Share, samples: int) -> Step:
    def halves() -> Sequence[Step]:
        pairs = zip(retain.halves(), forget.halves(), strict=True) if max(retain.count, forget.count) > 1 else ()
        return [_step(alpha, half_r, half_f, samples) for half_r, half_f in pairs] or [step]

    step = Step(partial(loss, alpha, retain, forget), samples, 1.0, halves)
    return step


def phases(context: ClassifierContext[NegGradConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: each retain image once, in random order; each retain batch is paired with a forget batch."""
    config, retain = context.config, context.retain

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        kept, gone = shares(retain, config, generator, group), cycled(context.forget, config, generator, group)
        for share_r, share_f in zip(kept, gone, strict=False):
            yield _step(config.retain_weight, share_r, share_f, share_r.batch)

    return [Phase("paired", retain.labels.device, len(retain), batches_of(retain, config), draw)]


def passes(context: ClassifierContext[NegGradConfig]) -> float:
    """Return the cost in image passes: D_r and an equal number of D_f batches per epoch."""
    forget_images = cycled_count(context.forget, context.config, batches_of(context.retain_count, context.config))
    return context.config.epochs * (context.retain_count + forget_images)


METHOD = ClassifierMethod(
    phases,
    config_type=NegGradConfig,
    about="descends on D_r and ascends on D_f in each step",
    source="Kurmanji et al., NeurIPS 2023",
    defaults={"gradient_clip": 1.0},
    search={"retain_weight": (0.8, 0.999, False)},
    grows=True,
    passes=passes,
    shardable=True,
)
