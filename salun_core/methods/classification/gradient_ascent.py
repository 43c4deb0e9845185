"""Gradient ascent (GA): increase the loss of the forget set.

    max_θ  E_{(x, y) in D_f} CE(f_θ(x), y),    starting at θ_o

Source: Graves et al., "Amnesiac Machine Learning", AAAI 2021; Thudi et al., 2022; as the baseline of Fan et al.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, classification_loss
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.loop import Phase


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Negated mean cross-entropy."""
    return -classification_loss(model, images, labels)


def phases(context: ClassifierContext[UnlearnConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_f with the loss negated."""
    return [context.phase("forget", context.forget, loss)]


METHOD = ClassifierMethod(
    phases,
    about="ascends the loss of D_f",
    source="Graves et al., AAAI 2021; Thudi et al., 2022",
    defaults={"learning_rate": 5e-4},
    grows=True,
    shardable=True,
)
