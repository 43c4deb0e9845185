"""Gradient ascent (GA): climb the loss of the forget set.

    max_θ  E_{(x, y) in D_f} CE(f_θ(x), y),    starting at θ_o

Source: Graves et al., "Amnesiac Machine Learning", AAAI 2021; Thudi et al., 2022; as the baseline of Fan et al.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from salun_core.methods.classification.method import Method, Part, Task, cross_entropy


def ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """Negated mean cross-entropy."""
    return -cross_entropy(logits, labels)


def parts(task: Task, generator: torch.Generator) -> Sequence[Part]:
    """Return one epoch: D_f with the loss negated."""
    return [Part("forget", task.forget, ascent)]


METHOD = Method(parts, defaults={"learning_rate": 5e-4})
