"""Influence unlearning (IU, WoodFisher): one Newton-like step away from the forget set, in closed form.

    θ_u = θ_o + α k,    k = (λ I + 1/N Σ_i g_i g_i^T)^-1 v,    v = n_f / (n_f + n_r) (mean_{D_f} ∇ℓ - mean_{D_r} ∇ℓ)

α is `influence_strength`, λ is `influence_damping`. g_i are gradients of the cross-entropy of N single retain images
at θ_o. The inverse is never formed: k = (v - Σ_i a_i g_i) / λ with N a_i = g_i · k. Each image in turn updates its
a_i:

    δ = (g_i · k - N a_i) / (N + |g_i|² / λ),    a_i <- a_i + δ,    k <- k - δ g_i / λ,    from k = v / λ, a = 0

This is Gauss-Seidel iteration on N equations. Besides weights and gradient, it stores one vector. It recomputes the
gradients in each sweep. It converges to the exact product; one sweep is exact if the g_i are orthogonal.
The model is in eval mode and images are not augmented. An interrupted run restarts from the beginning.

Source: Izzo et al., AISTATS 2021, and Singh & Alistarh, "WoodFisher", NeurIPS 2020, as the baseline of Fan et al.,
ICLR 2024, and Jia et al., NeurIPS 2023. Deviations: docs/research/deviations.md, row `influence`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.errors import DivergedError
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, cross_entropy
from salun_core.methods.config import UnlearnConfig
from salun_core.saliency.scores import scoring


class InfluenceConfig(UnlearnConfig):
    """Settings of the step and of the Fisher matrix; those of a training are not used."""

    influence_strength: float = Field(
        default=15.0, gt=0, allow_inf_nan=False, description="α, what the direction is multiplied by"
    )
    influence_samples: int = Field(default=1000, ge=1, description="N, single retain images of the Fisher")
    influence_sweeps: int = Field(
        default=1, ge=1, description="times that these images are gone through; many give the exact inverse"
    )
    influence_damping: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="λ, added to the Fisher's diagonal"
    )


def edit(context: ClassifierContext[InfluenceConfig]) -> None:
    """Compute v, k and θ_u, in place; `DivergedError` if the direction is not finite."""
    assert context.model is not None
    config, model = context.config, context.model
    with scoring(model):
        v = removal_gradient(context)
        images, damping, sweeps = fisher_images(context), config.influence_damping, config.influence_sweeps
        k = inverse_product(model, images, v, damping=damping, sweeps=sweeps)
    if not all(bool(torch.isfinite(values).all()) for values in k):
        raise DivergedError("the influence is not finite", "a gradient is NaN or infinite", "check images and weights")
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), k, strict=True):
            parameter.add_(values, alpha=config.influence_strength)


def removal_gradient(context: ClassifierContext[InfluenceConfig]) -> list[Tensor]:
    """Return v, one tensor per parameter, accumulated in the `.grad` tensors."""
    assert context.model is not None
    n_f, n_r = len(context.forget), len(context.retain)
    for images, weight in ((context.forget, 1 / (n_f + n_r)), (context.retain, -n_f / ((n_f + n_r) * n_r))):
        for inputs, labels in images.batches(context.config.batch_size):
            loss = cross_entropy(context.model(inputs), labels) * (len(labels) * weight)
            loss.backward()  # type: ignore[no-untyped-call]
    return _taken(context.model)


def fisher_images(context: ClassifierContext[InfluenceConfig]) -> ImageSource:
    """Draw the N retain images of the Fisher matrix, at most `influence_samples`."""
    generator = torch.Generator().manual_seed(context.config.seed)
    order = torch.randperm(len(context.retain), generator=generator)
    return context.retain.select(order[: context.config.influence_samples])


def inverse_product(
    model: nn.Module, images: ImageSource, vector: list[Tensor], *, damping: float, sweeps: int
) -> list[Tensor]:
    """Return k = (λ I + 1/N Σ g g^T)^-1 v, one tensor per parameter; `vector` is v and is overwritten.

    The model is in eval mode, all parameters require gradients, and all `.grad` are None. `damping` is λ.
    """
    n = len(images)
    k = [values.div_(damping) for values in vector]
    a = k[0].new_zeros(n)
    for _ in range(sweeps):
        for i, (inputs, labels) in enumerate(images.batches(1)):
            cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            g = _taken(model)
            delta = (_dot(g, k) - n * a[i]) / (n + _dot(g, g) / damping)
            a[i] += delta
            for values, slope in zip(k, g, strict=True):
                values.addcmul_(slope, delta / damping, value=-1)
    return k


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _taken(model: nn.Module) -> list[Tensor]:
    found = [
        torch.zeros_like(parameter, requires_grad=False) if parameter.grad is None else parameter.grad.detach()
        for parameter in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    return found


def passes(context: ClassifierContext[InfluenceConfig]) -> float:
    """Return the cost in image passes: both sets once, and the Fisher images once per sweep."""
    samples = min(context.config.influence_samples, len(context.retain))
    return len(context.forget) + len(context.retain) + samples * context.config.influence_sweeps


METHOD = ClassifierMethod(
    edit=edit,
    config_type=InfluenceConfig,
    about="one Newton-like step in closed form",
    source='Izzo et al., AISTATS 2021; Singh & Alistarh, "WoodFisher", NeurIPS 2020',
    defaults={"epochs": 1},
    needs="one vector",
    search={"influence_strength": (1.5, 150.0, True)},
    passes=passes,
)
