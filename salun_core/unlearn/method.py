"""What a method is: which images, under which labels and which loss, make up one epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from salun_core.data.images import ImageSet

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] and labels [B]."""
    return torch.nn.functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Part:
    """A stretch of an epoch: every image once, in random order.

    Args:
        name: for the history: forget, retain or mixed.
        images: what to train on, with the labels to train towards.
        loss: (logits, labels) -> scalar to descend.
    """

    name: str
    images: ImageSet
    loss: Loss = cross_entropy


@dataclass(frozen=True)
class Task:
    """What a method gets to work with.

    Args:
        forget: D_f with its true labels.
        retain: D_r with its true labels.
        num_classes: K, the model's outputs.
        order: sequential or mixed.
    """

    forget: ImageSet
    retain: ImageSet
    num_classes: int
    order: Literal["sequential", "mixed"]


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Args:
        parts: (task, generator) -> the parts of one epoch; the generator is the epoch's own.
        needs_mask: whether it trains salient weights only.
        fresh_start: whether it begins from fresh weights.
        defaults: configuration that differs from `UnlearnConfig`'s defaults.
    """

    parts: Callable[[Task, torch.Generator], Sequence[Part]]
    needs_mask: bool = False
    fresh_start: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
