"""Masked small gradients (MSG): draw the least important convolution weights afresh, then train on the retain set.

    g = Σ_{D'} ∇_θ ℓ - Σ_{D_f} ∇_θ ℓ    at θ_o, with D' a draw from D_r of the size of D_f
    θ_j <- N(0, 2 / fan_out)            in each layer, for the share ρ of its weights with the smallest |g_j|
    then descend CE(D_r), with the gradient of the other weights of these layers multiplied by κ

ρ is `reset_share`, κ is `kept_gradient`. The layers are the convolutions; for a model without any, the linear layers. A
small |g| means that a weight does not tell D_f from D_r. D_f is not trained on.

Source: an entry of the NeurIPS 2023 unlearning challenge; named and measured in Cadet et al., "Deep Unlearn:
Benchmarking Machine Unlearning", 2024. Deviations: docs/research/deviations.md, row `msg`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from salun_core.data.images import ImageSource
from salun_core.device_memory import fitting
from salun_core.errors import ModelError
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, cross_entropy
from salun_core.methods.config import DrawingConfig
from salun_core.methods.loop import Phase
from salun_core.saliency.scores import scoring

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MsgConfig(DrawingConfig):
    """Which weights are drawn afresh, and how the others are trained."""

    reset_share: float = Field(
        default=0.3, gt=0, le=1, description="ρ, share of each layer's weights that are drawn afresh"
    )
    kept_gradient: float = Field(
        default=0.1, ge=0, le=1, description="κ, factor on the gradient of the other weights of these layers"
    )


def layers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the convolutions by parameter name, or those of the linear layers.

    A model with neither is a `ModelError`.
    """
    for kind in (_CONVOLUTIONS, nn.Linear):
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
        found = {f"{name}.weight".lstrip("."): layer.weight for name, layer in layers if layer.weight.requires_grad}
        if found:
            return found
    raise ModelError("the model has no layer to reset", "MSG needs convolutions or linear layers", "use another method")


def gradient_difference(context: ClassifierContext[MsgConfig]) -> dict[str, Tensor]:
    """Return g by parameter name, of the layers only."""
    model, config = context.model, context.config
    assert model is not None
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(context.retain), generator=generator)
    drawn = context.retain.select(order[: len(context.forget)])

    def summed(images: ImageSource, size: int) -> dict[str, Tensor]:
        with scoring(model):
            for inputs, labels in images.batches(size):
                (cross_entropy(model(inputs), labels) * len(labels)).backward()  # type: ignore[no-untyped-call]
            return {name: weight.grad for name, weight in layers_of(model).items() if weight.grad is not None}

    kept, gone = (fitting(partial(summed, images), config.batch_size)[0] for images in (drawn, context.forget))
    return {name: kept[name] - gone[name] for name in kept}


@torch.no_grad()
def reset(weights: Mapping[str, Tensor], g: Mapping[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """Draw new weights in place, and return which ones were drawn, as boolean masks by name.

    `g` is the gradient difference of each layer; `share` is ρ.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, weight in weights.items():
        # A stable sort: weights of equal |g|, such as those of a unit that is never active, are taken by index.
        order = g[name].abs().flatten().cpu().sort(stable=True).indices
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[order[: round(share * weight.numel())]] = True
        chosen = chosen.view(weight.shape).to(weight.device)
        fresh = torch.empty(weight.shape, dtype=weight.dtype)
        nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu", generator=generator)
        weight.copy_(torch.where(chosen, fresh.to(weight.device), weight))
        drawn[name] = chosen
    return drawn


def begin(context: ClassifierContext[MsgConfig]) -> ClassifierContext[MsgConfig]:
    """Compute g and draw weights afresh; the same in each call, because a resumed run begins at θ_o too."""
    assert context.model is not None
    g = gradient_difference(context)
    weights = {name: weight for name, weight in layers_of(context.model).items() if name in g}
    return replace(context, salient=reset(weights, g, context.config.reset_share, context.config.seed))


def loss(context: ClassifierContext[MsgConfig], model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; κ is applied by a detached copy of each weight, which leaves the weights as they are."""
    kappa, parameters = context.config.kept_gradient, dict(model.named_parameters())
    scaled = {}
    for name, drawn in context.salient.items():
        weight = parameters[name]
        scaled[name] = torch.where(drawn, weight, weight.detach() + kappa * (weight - weight.detach()))
    return cross_entropy(functional_call(model, scaled, (images,)), labels)


def phases(context: ClassifierContext[MsgConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_r."""
    return [context.phase("retain", context.retain, partial(loss, context))]


def passes(context: ClassifierContext[MsgConfig]) -> float:
    """Return the cost in image passes: D_f and D' for g, then D_r in each epoch."""
    drawn = min(len(context.forget), len(context.retain))
    return len(context.forget) + drawn + context.config.epochs * context.retain_count


METHOD = ClassifierMethod(
    phases,
    config_type=MsgConfig,
    about="resets weights with a small gradient to random values, then trains on D_r",
    source='the NeurIPS 2023 unlearning challenge; Cadet et al., "Deep Unlearn", 2024',
    defaults={"learning_rate": 0.01, "schedule": "cosine", "batch_norm": "update"},
    search={"reset_share": (0.05, 0.9, False)},
    begin=begin,
    passes=passes,
)
