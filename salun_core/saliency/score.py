"""The saliency of each weight: |d mean loss over the forget set / d weight|, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from salun_core.errors import DataError, ModelError

LossFn = Callable[[Tensor, Tensor], Tensor]


def saliency_scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn) -> dict[str, Tensor]:
    """Score every parameter by the magnitude of the forgetting loss's gradient (SalUn, eq. 4).

    The gradient is of the mean over samples, so a short last batch does not weigh more than the others. It is
    accumulated in `.grad` itself: no second copy of the model is made. The model is in eval mode meanwhile;
    its modes, its gradients and its `requires_grad` flags are as before afterwards.

    Args:
        model: the original model θ_o, unchanged by the call.
        batches: the forget set D_f once, as (inputs, targets) on the model's device.
        loss_fn: (model output, targets) -> mean loss over the batch, a scalar.

    Returns:
        By parameter name, in the model's order: a tensor of the parameter's shape, >= 0. A parameter that the
        loss does not reach scores 0.

    Raises:
        DataError: there is no batch.
        ModelError: the model has no parameters, or a gradient is NaN or infinite.

    Source:
        Fan et al., "SalUn", ICLR 2024, section 4, equation (4).
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(
            "model has no parameters", "there is nothing to score", "check that the right model was loaded"
        )
    with scoring(model):
        total = _accumulate(model, batches, loss_fn)
        if total == 0:
            raise DataError("forget set is empty", "no batch was given to score", "name at least one sample to forget")
        return {name: _score(name, parameter, total) for name, parameter in parameters.items()}


def _accumulate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss_fn: LossFn) -> int:
    total = 0
    for inputs, targets in batches:
        size = len(inputs)
        if size == 0:
            continue
        (loss_fn(model(inputs), targets) * size).backward()  # type: ignore[no-untyped-call]
        total += size
    return total


def _score(name: str, parameter: nn.Parameter, total: int) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter, requires_grad=False)
    score = mean_magnitude(name, parameter.grad.detach(), total)
    parameter.grad = None
    return score


def mean_magnitude(name: str, gradient: Tensor, total: int) -> Tensor:
    """Turn the gradient of a sum over samples into the score, in place.

    Args:
        name: of the parameter.
        gradient: of the summed loss, of the parameter's shape.
        total: number of samples.

    Returns:
        The same tensor, |gradient / total|.

    Raises:
        ModelError: it is NaN or infinite somewhere.
    """
    score = gradient.div_(total).abs_()
    if not bool(torch.isfinite(score).all()):
        raise ModelError(
            f"saliency of {name} is not finite",
            "the forgetting loss has a NaN or infinite gradient",
            "check the model's weights and the images for NaN",
        )
    return score


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode with every gradient asked for and none there; leave it as it was.

    Args:
        model: to take gradients of.
    """
    modes = {module: module.training for module in model.modules()}
    kept = {parameter: (parameter.grad, parameter.requires_grad) for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (grad, requires_grad) in kept.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
