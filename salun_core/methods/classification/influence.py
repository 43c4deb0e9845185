"""Influence unlearning (IU, WoodFisher): one Newton-like step away from the forget set, in closed form.

    θ_u = θ_o + α k,    k = (λ I + 1/N Σ_i g_i g_i^T)^-1 v,    v = n_f / (n_f + n_r) (mean_{D_f} ∇ℓ - mean_{D_r} ∇ℓ)

g_i are gradients of the cross-entropy of N single retain images at θ_o. The inverse is never formed: as
k = (v - Σ_i a_i g_i) / λ with N a_i = g_i · k, each image in turn sets its own a_i right,

    δ = (g_i · k - N a_i) / (N + |g_i|² / λ),    a_i <- a_i + δ,    k <- k - δ g_i / λ,    from k = v / λ, a = 0

which is Gauss-Seidel on N equations. It needs one vector beside weights and gradient, and the gradients anew in each
sweep. It converges to the exact product; one sweep is exact where the g_i are orthogonal.

Source: Izzo et al., AISTATS 2021, and Singh & Alistarh, "WoodFisher", NeurIPS 2020, as the baseline of Fan et al.,
ICLR 2024, and Jia et al., NeurIPS 2023. The reference's recursion keeps one running vector for all images and so
only ever corrects along the first image's gradient; it takes the first N images, where a seed draws them here.
The model is in eval mode and images are not augmented; an interrupted run starts again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSet
from salun_core.errors import ModelError
from salun_core.methods.classification.method import Method, MethodContext, cross_entropy
from salun_core.saliency.scores import scoring


def edit(context: MethodContext) -> None:
    """Change the model in training once, in place.

    Raises:
        ModelError: the direction is not finite.
    """
    assert context.model is not None
    config, model = context.config, context.model
    with scoring(model):
        vector = removal_gradient(context)
        step = inverse_product(
            model, fisher_images(context), vector, damping=config.influence_damping, sweeps=config.influence_sweeps
        )
    if not all(bool(torch.isfinite(values).all()) for values in step):
        raise ModelError("the influence is not finite", "a gradient is NaN or infinite", "check images and weights")
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), step, strict=True):
            parameter.add_(values, alpha=config.influence_strength)


def removal_gradient(context: MethodContext) -> list[Tensor]:
    """Return v, one tensor a parameter; it is summed up in the gradients themselves."""
    assert context.model is not None
    forgotten, kept = len(context.forget), len(context.retain)
    total = forgotten + kept
    for images, weight in ((context.forget, 1 / total), (context.retain, -forgotten / (total * kept))):
        for inputs, labels in images.batches(context.config.batch_size):
            loss = cross_entropy(context.model(inputs), labels) * (len(labels) * weight)
            loss.backward()  # type: ignore[no-untyped-call]
    return _taken(context.model)


def fisher_images(context: MethodContext) -> ImageSet:
    """Draw the retain images of the Fisher matrix, at most `influence_samples`."""
    generator = torch.Generator().manual_seed(context.config.seed)
    order = torch.randperm(len(context.retain), generator=generator)
    return context.retain.select(order[: context.config.influence_samples])


def inverse_product(
    model: nn.Module, images: ImageSet, vector: list[Tensor], *, damping: float, sweeps: int
) -> list[Tensor]:
    """Return (λ I + 1/N Σ g g^T)^-1 v.

    Args:
        model: in eval mode, every gradient asked for and none there.
        images: N single images of the Fisher matrix.
        vector: v, one tensor a parameter; it is overwritten.
        damping: λ.
        sweeps: how often to go through the images.

    Returns:
        One tensor a parameter.
    """
    count = len(images)
    product = [values.div_(damping) for values in vector]
    coefficients = product[0].new_zeros(count)
    for _ in range(sweeps):
        for index, (inputs, labels) in enumerate(images.batches(1)):
            cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            gradient = _taken(model)
            change = _dot(gradient, product) - count * coefficients[index]
            change = change / (count + _dot(gradient, gradient) / damping)
            coefficients[index] += change
            for values, slope in zip(product, gradient, strict=True):
                values.addcmul_(slope, change / damping, value=-1)
    return product


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _taken(model: nn.Module) -> list[Tensor]:
    """Return the gradients, and leave none."""
    found = [
        torch.zeros_like(parameter, requires_grad=False) if parameter.grad is None else parameter.grad.detach()
        for parameter in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    return found


def passes(context: MethodContext) -> float:
    """Return images forward and backward: both sets, and the Fisher's images in each sweep."""
    samples = min(context.config.influence_samples, len(context.retain))
    return len(context.forget) + len(context.retain) + samples * context.config.influence_sweeps


METHOD = Method(
    edit=edit,
    defaults={"epochs": 1},
    reads=frozenset({"influence_strength", "influence_samples", "influence_sweeps", "influence_damping"}),
    passes=passes,
)
