"""Boundary shrink (BS): move each forget image over the nearest decision boundary of the original.

    min_θ  E_{(x, y) in D_f} CE(f_θ(x), y'),    y' = argmax_{k != y} f_θo(x + ε sign ∇_x CE(f_θo(x), y))_k

ε is `adversarial_step`, in pixels from 0 to 1 before normalisation; the moved image stays within these bounds. Images
without a known normalisation are moved by ε as they are, without bounds. y' is computed for each augmented batch by
the frozen θ_o.

Source: Chen et al., "Boundary Unlearning", CVPR 2023; as the baseline of Fan et al., ICLR 2024. Deviations:
docs/research/deviations.md, rows `boundary_shrink`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.data.images import Normalisation
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, cross_entropy
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.loop import Phase


class ShrinkConfig(UnlearnConfig):
    """Length of the step to the boundary."""

    adversarial_step: float = Field(default=0.1, gt=0, le=1, description="ε, where pixels go from 0 to 1")


def nearest_wrong_labels(
    original: nn.Module, images: Tensor, labels: Tensor, step: float, normalisation: Normalisation | None
) -> Tensor:
    """Return y', int64 [B]: the label after one step of the fast gradient sign method, the true one excluded.

    Images are normalised [B, C, H, W]; `step` is ε, in pixels from 0 to 1. `normalisation` is None if unknown.
    """
    inputs = images.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(cross_entropy(original(inputs), labels), inputs)
    with torch.no_grad():
        logits: Tensor = original(stepped(images, slope.sign(), step, normalisation))
        return logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)


def stepped(images: Tensor, direction: Tensor, step: float, normalisation: Normalisation | None) -> Tensor:
    """Return images moved by ε along a direction and clipped to the pixel range; arguments as above."""
    if normalisation is None:
        return images + step * direction
    mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        for values in (normalisation.mean, normalisation.std)
    )
    return (images + step / std * direction).maximum(-mean / std).minimum((1 - mean) / std)


def loss(context: ClassifierContext[ShrinkConfig], model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with the nearest wrong labels."""
    assert context.original is not None
    nearest = nearest_wrong_labels(
        context.original, images, labels, context.config.adversarial_step, context.forget.normalisation
    )
    return cross_entropy(model(images), nearest)


def phases(context: ClassifierContext[ShrinkConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_f."""
    return [context.phase("forget", context.forget, partial(loss, context))]


def passes(context: ClassifierContext[ShrinkConfig]) -> float:
    """Return the cost in image passes: the model, θ_o for the gradient, and a third of a pass of θ_o for y'."""
    return context.config.epochs * len(context.forget) * 7 / 3


METHOD = ClassifierMethod(
    phases,
    config_type=ShrinkConfig,
    about="trains D_f towards the nearest wrong class",
    source="Chen et al., CVPR 2023",
    defaults={"learning_rate": 1e-4},
    needs_original=True,
    grows=True,
    passes=passes,
)
