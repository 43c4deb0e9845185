"""Boundary expanding (BE): train the forget set towards a new class, and remove the class afterwards.

    min_θ'  E_{x in D_f} CE(f_θ'(x), K),    θ' = θ and one more row of the last layer;    θ_u = θ' without that row

The retain set is not used. The new row is drawn as `nn.Linear` initialises its rows.

Source: Chen et al., "Boundary Unlearning", CVPR 2023; as the baseline of Fan et al., ICLR 2024. Deviations:
docs/research/deviations.md, row `boundary_expanding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from salun_core.errors import ModelError
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.loop import Phase


def last_linear(model: nn.Module, outputs: int) -> nn.Linear:
    """Return the last linear layer with this number of outputs; `ModelError` if the model has none."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == outputs]
    if not found:
        raise ModelError(
            "the model has no layer to expand",
            f"boundary_expanding needs a linear layer of {outputs} outputs",
            "use another method",
        )
    return found[-1]


def begin(context: ClassifierContext[UnlearnConfig]) -> ClassifierContext[UnlearnConfig]:
    """Add a row to the last layer, in place; `ModelError` if the number of outputs does not grow with it."""
    assert context.model is not None
    head = last_linear(context.model, context.num_classes)
    bound = 1 / math.sqrt(head.in_features)
    generator = torch.Generator().manual_seed(context.config.seed)
    row = (2 * torch.rand(head.in_features + 1, generator=generator) - 1) * bound
    _replace(head, "weight", torch.cat([head.weight.detach(), row[None, :-1].to(head.weight)]))
    if head.bias is not None:
        _replace(head, "bias", torch.cat([head.bias.detach(), row[-1:].to(head.bias)]))
    head.out_features += 1
    _check_outputs(context.model, context, context.num_classes + 1)
    return context


@torch.no_grad()
def _check_outputs(model: nn.Module, context: ClassifierContext[UnlearnConfig], expected: int) -> None:
    what, remedy = "the model's last linear layer does not compute its logits", "use another method"
    try:
        outputs = model(next(iter(context.forget.select([0]).batches(1)))[0]).shape[1]
    except RuntimeError as error:
        raise ModelError(what, f"with one more row it does not run: {str(error).splitlines()[0]}", remedy) from error
    if outputs != expected:
        raise ModelError(what, f"with one more row there are {outputs} outputs", remedy)


def finish(model: nn.Module, num_classes: int) -> None:
    """Remove the added row, in place."""
    head = last_linear(model, num_classes + 1)
    _replace(head, "weight", head.weight.detach()[:-1].clone())
    if head.bias is not None:
        _replace(head, "bias", head.bias.detach()[:-1].clone())
    head.out_features -= 1


def _replace(head: nn.Linear, name: str, values: Tensor) -> None:
    old = getattr(head, name)
    setattr(head, name, nn.Parameter(values, requires_grad=old.requires_grad))


def phases(context: ClassifierContext[UnlearnConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_f under the label K."""
    new_class = torch.full_like(context.forget.labels, context.num_classes)
    return [context.phase("forget", context.forget.relabelled(new_class))]


METHOD = ClassifierMethod(
    phases,
    about="trains D_f towards an additional class, then removes this class",
    source='Chen et al., "Boundary Unlearning", CVPR 2023',
    defaults={"learning_rate": 1e-4},
    needs="a linear head",
    begin=begin,
    finish=finish,
)
