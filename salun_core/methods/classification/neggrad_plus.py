"""NegGrad+: descend the loss of the retain set and climb that of the forget set in every step.

    min_θ  α E_{(x, y) in D_r} CE(f_θ(x), y)  -  (1 - α) E_{(x, y) in D_f} CE(f_θ(x), y)

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023 (their tuned form of NegGrad).
An epoch is one pass over D_r; each of its batches is paired with one of D_f, which is gone through again in a new
order whenever it is used up. The authors repeat the order of the first time, and do not clip the gradient; without
that the loss of a whole class, which has no bound, takes the rest with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from salun_core.methods.classification.method import (
    Method,
    MethodContext,
    batches_of,
    classification_loss,
    cycled,
    cycled_count,
)
from salun_core.methods.distributed import ProcessGroup, Share
from salun_core.methods.loop import Phase, Step


def paired_loss(alpha: float, retain: Share, forget: Share, model: nn.Module) -> Tensor:
    """This process's summand of the batch's loss, α CE(retain) - (1 - α) CE(forget)."""
    kept = classification_loss(model, retain.images, retain.labels) * retain.weight
    forgotten = classification_loss(model, forget.images, forget.labels) * forget.weight
    return alpha * kept - (1 - alpha) * forgotten


def phases(context: MethodContext, generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: every retain image once, in random order, each batch paired with one of forget images."""
    config, retain = context.config, context.retain

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        kept = retain.batches(config.batch_size, generator, config.augment)
        forgotten = cycled(context.forget, config, generator)
        for retained, paired in zip(kept, forgotten, strict=False):
            loss = partial(paired_loss, config.retain_weight, group.share(*retained), group.share(*paired))
            yield Step(loss, len(retained[1]), 1.0)

    return [Phase("paired", retain.labels.device, len(retain), batches_of(retain, config), draw)]


def passes(context: MethodContext) -> float:
    """Return images forward and backward: D_r and as many batches of D_f, each epoch."""
    forgotten = cycled_count(context.forget, context.config, batches_of(context.retain, context.config))
    return context.config.epochs * (len(context.retain) + forgotten)


METHOD = Method(phases, defaults={"gradient_clip": 1.0}, reads=frozenset({"retain_weight"}), passes=passes)
