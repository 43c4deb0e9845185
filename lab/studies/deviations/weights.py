"""The agreement of two masks, and the change of weights outside a mask."""

from __future__ import annotations

import torch
from torch import nn

from salun_core.saliency import SaliencyMask


def overlap(name: str, left: SaliencyMask, right: SaliencyMask) -> dict[str, float]:
    """Return the share of bits that differ, and the Jaccard index of the salient weights."""
    pairs = [(left.tensor(key), right.tensor(key)) for key in left.shapes]
    both, either = (
        sum(int(values.sum()) for values in found) for found in ([a & b for a, b in pairs], [a | b for a, b in pairs])
    )
    return {f"{name}: bits that differ": (either - both) / left.weights, f"{name}: Jaccard": both / either}


def frozen_change(before: nn.Module, after: nn.Module, mask: SaliencyMask) -> dict[str, float]:
    """Return the share of weights outside a mask that changed, and their change relative to their norm."""
    outside = [~mask.tensor(name) for name, _ in before.named_parameters()]
    old, new = (
        torch.cat([weight.detach()[chosen] for weight, chosen in zip(model.parameters(), outside, strict=True)])
        for model in (before, after)
    )
    return {
        "frozen that changed": float((old != new).float().mean()),
        "relative change": float((new - old).norm() / old.norm()),
    }
