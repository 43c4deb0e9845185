"""Bit-for-bit comparison of two sets of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from salun_core.errors import ModelError
from salun_core.evaluation.evidence import Integrity
from salun_core.saliency import SaliencyMask


def compare_weights(before: nn.Module, after: nn.Module, mask: SaliencyMask | None = None) -> Integrity:
    """Count the weights that differ in any bit, inside and outside a mask, and those that are not finite."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    buffers, after_buffers = dict(before.named_buffers()), dict(after.named_buffers())
    if _kinds(old | buffers) != _kinds(new | after_buffers):
        raise ModelError(
            "the two models differ",
            "their parameters or buffers have other names, shapes or types",
            "compare a model with a version unlearned from it",
        )
    if mask is not None:
        mask.check_fits({name: tuple(parameter.shape) for name, parameter in new.items()})
    changed = {name: _differing_bits(old[name], new[name]) for name in old}
    frozen = sum(int((changed[name] & ~mask.tensor(name)).sum()) for name in changed) if mask is not None else None
    state = [*new.values(), *after_buffers.values()]
    return Integrity(
        weights=sum(parameter.numel() for parameter in new.values()),
        weights_changed=sum(int(bits.sum()) for bits in changed.values()),
        frozen_changed=frozen,
        non_finite=sum(int((~torch.isfinite(value)).sum()) for value in state if value.is_floating_point()),
        distance=_distance(old, new),
        buffers_changed=sum(int(_differing_bits(buffers[name], value).sum()) for name, value in after_buffers.items()),
    )


def with_text_encoder(found: Integrity, before: nn.Module, after: nn.Module) -> Integrity:
    """Add the text encoders before and after, which may be trained, to the comparison of the denoisers.

    No mask covers a text encoder: under a mask all its changed weights count as frozen ones. If it changed, no distance
    is known, and so the model cannot pass for a retrained one.
    """
    text = compare_weights(before, after)
    frozen = None if found.frozen_changed is None else found.frozen_changed + text.weights_changed
    changes = {
        "weights": found.weights + text.weights,
        "weights_changed": found.weights_changed + text.weights_changed,
        "frozen_changed": frozen,
        "non_finite": found.non_finite + text.non_finite,
        "buffers_changed": found.buffers_changed + text.buffers_changed,
        "distance": None if text.weights_changed else found.distance,
    }
    return found.model_copy(update=changes)


def _distance(old: dict[str, Parameter], new: dict[str, Parameter]) -> float | None:
    """Return |new - s old| / |new| over the weight matrices, with the best factor s for each; None if it is not finite.

    From 0 (the same up to factors) to 1 (unrelated). A factor per layer is left out, because a layer can be scaled
    without changing what a model does. So are biases and the scales of normalisation: fresh ones are all 0 or all 1,
    and thus alike.
    """
    apart = length = 0.0
    for name, parameter in old.items():
        if parameter.dim() < 2:
            continue
        before, after = parameter.detach().double().cpu(), new[name].detach().double().cpu()
        square = float(before.square().sum())
        factor = float((before * after).sum()) / square if square > 0 else 0.0
        apart += float((after - factor * before).square().sum())
        length += float(after.square().sum())
    return math.sqrt(apart / length) if length > 0 and math.isfinite(apart) else None


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _differing_bits(left: Tensor, right: Tensor) -> Tensor:
    """Return where two tensors of one shape differ in any bit, on the CPU.

    Bytes are compared, not numbers: 0.0 equals -0.0, and NaN does not equal itself.
    """
    left, right = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
    width = left.element_size()
    a, b = left.view(-1).view(torch.uint8).view(-1, width), right.view(-1).view(torch.uint8).view(-1, width)
    return (a != b).any(dim=1).view(left.shape)
