"""SalUn-soft: random labelling, with a soft threshold on how far each weight moved in place of a mask.

    after each step  θ <- θ_o + S_t(θ - θ_o),    S_t(d) = sign(d) max(|d| - t, 0),    t = the q-quantile of |θ - θ_o|
    q = (1 - `soft_density`) (1 - s / S) after step s of S

Source: Fan et al., "SalUn", ICLR 2024 (the soft-thresholding variant): a proximal step for β ||θ - θ_o||_1 whose
strength falls linearly. t is the exact order statistic over all weights: of n weights the round(q n) that moved least
are back at θ_o, with its bits. After the last step q is 0, so nearly every weight of the result differs from the
original's; the result says what share did. Momentum is not thresholded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from salun_core.methods.classification import random_label
from salun_core.methods.classification.method import Method, MethodContext
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import Phase, Step
from salun_core.saliency.threshold import as_ordered, kth_largest


@torch.no_grad()
def shrink(model: nn.Module, original: nn.Module, share: float) -> None:
    """Threshold softly how far the weights moved, in place.

    Args:
        model: θ.
        original: θ_o, on the same device.
        share: q in [0, 1): of all weights, how many go back to the original's value; ties go back too.
    """
    pairs = list(zip(model.parameters(), original.parameters(), strict=True))
    total = sum(parameter.numel() for parameter, _ in pairs)
    back = round(share * total)
    if not back:
        return
    moved = [parameter - before for parameter, before in pairs]
    ordered, _ = kth_largest([as_ordered(change) for change in moved], total - back + 1)
    wide = torch.int64 if moved[0].dtype == torch.float64 else torch.int32
    threshold = torch.tensor([ordered], dtype=wide, device=moved[0].device).view(
        torch.float64 if wide == torch.int64 else torch.float32
    )
    for (parameter, before), change in zip(pairs, moved, strict=True):
        nearer = parameter - change.sign() * threshold
        parameter.copy_(torch.where(change.abs() <= threshold, before, nearer))


def softened(inner: Phase, context: MethodContext, first: int, of_epoch: int) -> Phase:
    """Return a phase of random labelling that draws the weights back after each of its steps.

    Args:
        inner: the phase of random labelling.
        context: model and original.
        first: number of steps of this epoch that come before the phase.
        of_epoch: number of steps of the whole epoch.
    """
    model, original, config = context.model, context.original, context.config

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        assert model is not None
        assert original is not None
        for done, step in enumerate(inner.draw(generator, group), first + 1):
            yield step  # the code below runs after the optimiser has taken the step
            left = 1 - (context.epoch + done / of_epoch) / config.epochs
            shrink(model, original, max(0.0, (1 - config.soft_density) * left))

    return replace(inner, draw=draw)


def phases(context: MethodContext, generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch of random labelling, softened."""
    inner = random_label.phases(context, generator)
    counts = [phase.steps for phase in inner]
    return [softened(phase, context, sum(counts[:index]), sum(counts)) for index, phase in enumerate(inner)]


METHOD = Method(phases, reads=frozenset({"soft_density"}), needs_original=True)
