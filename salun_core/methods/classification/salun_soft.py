"""SalUn-soft: random labelling with a soft threshold on the change of each weight instead of a mask.

    after each step  θ <- θ_o + S_t(θ - θ_o),    S_t(d) = sign(d) max(|d| - t, 0),    t = the q-quantile of |θ - θ_o|
    q = (1 - `soft_density`) (1 - s / S) after step s of S

This is a proximal step for β ||θ - θ_o||_1 whose strength falls linearly. t is the exact order statistic over all
weights: of n weights, the round(q n) that changed least revert to θ_o exactly. After the last step q is 0, so nearly
every weight of the result differs from the original; `changed_fraction` of the result reports the share. Momentum is
not thresholded.

Source: Fan et al., "SalUn", ICLR 2024 (the soft-thresholding variant). Deviations: docs/research/deviations.md, row
`salun_soft`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from salun_core.methods.classification import random_label
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import Phase, Step
from salun_core.saliency.threshold import as_ordered, kth_largest


class SoftConfig(random_label.RandomLabelConfig):
    """Random labelling, and how many weights may differ."""

    soft_density: float = Field(
        default=0.5, gt=0, le=1, description="share of weights that differ after the first step; it grows to 1"
    )


@torch.no_grad()
def shrink(model: nn.Module, original: nn.Module, share: float) -> None:
    """Apply the soft threshold to the changes of all weights, in place.

    The share q in [0, 1) of the weights returns to θ_o; weights with a change of exactly t return too.
    """
    pairs = list(zip(model.parameters(), original.parameters(), strict=True))
    total = sum(parameter.numel() for parameter, _ in pairs)
    returning = round(share * total)
    if not returning:
        return
    changes = [parameter - before for parameter, before in pairs]
    ordered, _ = kth_largest([as_ordered(change) for change in changes], total - returning + 1)
    integer, floating = (
        (torch.int64, torch.float64) if changes[0].dtype == torch.float64 else (torch.int32, torch.float32)
    )
    threshold = torch.tensor([ordered], dtype=integer, device=changes[0].device).view(floating)  # undo `as_ordered`
    for (parameter, before), change in zip(pairs, changes, strict=True):
        shrunk = parameter - change.sign() * threshold
        parameter.copy_(torch.where(change.abs() <= threshold, before, shrunk))


def softened(inner: Phase, context: ClassifierContext[SoftConfig], first: int, of_epoch: int) -> Phase:
    """Return a phase of random labelling that applies the soft threshold after each step.

    `first` steps of the epoch precede the phase; `of_epoch` is the number of all its steps.
    """
    model, original, config = context.model, context.original, context.config

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        assert model is not None
        assert original is not None
        for done, step in enumerate(inner.draw(generator, group), first + 1):
            yield step  # the loop resumes here after the optimizer has taken the step
            # The strength falls linearly to 0 over the whole run, so the share is computed from the steps that remain.
            remaining = 1 - (context.epoch + done / of_epoch) / config.epochs
            shrink(model, original, max(0.0, (1 - config.soft_density) * remaining))

    return replace(inner, draw=draw)


def phases(context: ClassifierContext[SoftConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch of random labelling, softened."""
    inner = random_label.phases(context, generator)
    counts = [phase.steps for phase in inner]
    return [softened(phase, context, sum(counts[:index]), sum(counts)) for index, phase in enumerate(inner)]


METHOD = ClassifierMethod(
    phases,
    config_type=SoftConfig,
    about="as `random_label`, with a soft threshold on the change of each weight",
    source="Fan et al., ICLR 2024 (soft thresholding)",
    needs_original=True,
    search={"soft_density": (0.02, 1.0, True)},
)
