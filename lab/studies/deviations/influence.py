"""Compares one running vector, and one sweep over the images, with the exact inverse product."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lab.studies.deviations.stage import Stage
from lab.studies.deviations.theirs import one_running_vector
from salun_core.data import ImageSet
from salun_core.methods.classification import influence
from salun_core.methods.classification.method import ClassifierContext, cross_entropy
from salun_core.saliency.scores import scoring

EXACT_IMAGES = 200


def flat(tensors: list[Tensor]) -> Tensor:
    """Join tensors into one float64 vector."""
    return torch.cat([values.detach().reshape(-1) for values in tensors]).double()


def gradients_of(model: nn.Module, images: ImageSet) -> Iterator[Tensor]:
    """Yield the gradient of each image's loss, flat, in float64."""
    weights = list(model.parameters())
    for inputs, labels in images.batches(1):
        yield flat(list(torch.autograd.grad(cross_entropy(model(inputs), labels), weights)))


def exact_product(gradients: Tensor, vector: Tensor) -> Tensor:
    """Return (I + 1/N Σ g g^T)^-1 v through the N x N system, in float64.

    gradients: [N, weights]; vector: v, [weights].
    """
    count = len(gradients)
    system = count * torch.eye(count, dtype=gradients.dtype) + gradients @ gradients.T
    coefficients: Tensor = torch.linalg.solve(system, gradients @ vector)
    return vector - gradients.T @ coefficients


def distances(stage: Stage) -> dict[str, float]:
    """Compare both products, and how each moves v, with the exact ones for the same 200 images.

    By side: cosine to the exact product, cosine of the corrections k - v, and their relative error.
    """
    context = stage.context("influence", influence_samples=EXACT_IMAGES)
    model = copy.deepcopy(stage.base)
    with scoring(model):
        vector = influence.removal_gradient(_with_model(context, model))
    with scoring(model):
        images = influence.fisher_images(context)
        gradients = torch.stack(list(gradients_of(model, images)))
    start = flat(vector)
    with scoring(model):
        ours = flat(influence.inverse_product(model, images, vector, damping=1.0, sweeps=1))
    exact = exact_product(gradients, start)
    found = {"one sweep": ours, "running vector": one_running_vector(gradients, start, EXACT_IMAGES)}
    result = {"correction": float((exact - start).norm() / start.norm())}
    for name, product in found.items():
        result[f"{name}, cosine"] = _cosine(product, exact)
        result[f"{name}, cosine of the correction"] = _cosine(product - start, exact - start)
        result[f"{name}, error of the correction"] = float((product - exact).norm() / (exact - start).norm())
    return result


def edited(stage: Stage) -> nn.Module:
    """Return the model that the running vector yields, at the default strength and number of images."""
    config = stage.config("influence")
    model = copy.deepcopy(stage.base)
    with scoring(model):
        vector = flat(influence.removal_gradient(_with_model(stage.context("influence"), model)))
    count = config.influence_samples
    first = stage.retain.select(range(min(count + 2, len(stage.retain))))
    with scoring(model):
        step = one_running_vector(gradients_of(model, first), vector, count)
    start = 0
    with torch.no_grad():
        for weight in model.parameters():
            change = step[start : start + weight.numel()].view(weight.shape)
            weight.add_(change, alpha=config.influence_strength)
            start += weight.numel()
    return model.eval()


def _with_model(context: ClassifierContext, model: nn.Module) -> ClassifierContext:
    return ClassifierContext(context.forget, context.retain, context.num_classes, context.config, model)


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))
