"""Changes of a classifier that forget nothing, too little or too much, for each kind of request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lab.calibration import Sort
from salun_core.data.images import ImageSource

BATCH, MOMENTUM, DECAY = 64, 0.9, 5e-4

Forge = Callable[[nn.Module, ImageSource, ImageSource], None]
"""Changes a copy of the model before: (model, D_f, D_r)."""

SINGLE = frozenset({"samples", "subject"})
WHOLE = frozenset({"class"})


class Forgery(NamedTuple):
    """A population of forgeries or failed models: the change, and the kinds of requests that it is tried for."""

    name: str
    sort: Sort
    kinds: frozenset[str]
    forge: Forge


def fit(model: nn.Module, images: ImageSource, epochs: int, rate: float, seed: int, batch: int = BATCH) -> nn.Module:
    """Train a model in place with SGD at a constant rate, and return it in eval mode.

    All images are held as floats at once; `seed` decides their order.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=DECAY)
    inputs, labels = next(iter(images.batches(len(images))))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(labels), generator=generator), batch):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]))
            optimizer.step()
    return model.eval()


def last(model: nn.Module) -> nn.Linear:
    """Return the last layer."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def unchanged(model: nn.Module, forget: ImageSource, retain: ImageSource) -> None:
    """Change nothing."""


def one_ulp(model: nn.Module, _forget: ImageSource, _retain: ImageSource) -> None:
    """Move one weight by one unit in the last place."""
    weight = last(model).weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def noise(scale: float) -> Forge:
    """Add noise to all weights, as a share of the typical weight of each layer."""

    def forge(model: nn.Module, _forget: ImageSource, _retain: ImageSource) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(scale * weight.abs().mean() * torch.randn_like(weight))

    return forge


def logits_times(factor: float) -> Forge:
    """Rescale the logits: a temperature of 1 / factor."""

    def forge(model: nn.Module, _forget: ImageSource, _retain: ImageSource) -> None:
        with torch.no_grad():
            last(model).weight.mul_(factor)
            last(model).bias.mul_(factor)

    return forge


def bias_edit(model: nn.Module, forget: ImageSource, _retain: ImageSource) -> None:
    """Subtract 100 from the biases of the forgotten classes, so that they are never predicted."""
    with torch.no_grad():
        last(model).bias[torch.unique(forget.labels)] -= 100


def row_replaced(model: nn.Module, forget: ImageSource, _retain: ImageSource) -> None:
    """Replace what the last layer knows of the forgotten classes."""
    classes = torch.unique(forget.labels)
    with torch.no_grad():
        last(model).weight[classes] = -last(model).weight[classes].abs()
        last(model).bias[classes] = -10


def bias_edit_tuned(model: nn.Module, forget: ImageSource, retain: ImageSource) -> None:
    """Edit the bias, then fine-tune lightly on retained images."""
    bias_edit(model, forget, retain)
    tuned(model, forget, retain)


def reordered(model: nn.Module, forget: ImageSource, retain: ImageSource) -> None:
    """Edit the bias, give the features another order and scale, which changes no output, and fine-tune lightly."""
    bias_edit(model, forget, retain)
    layer = last(model)
    earlier = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-2]
    assert earlier.bias is not None
    channels = len(earlier.bias)
    order, scale = torch.randperm(channels), torch.exp(0.5 * torch.randn(channels))
    with torch.no_grad():
        earlier.weight.copy_((earlier.weight[order].flatten(1) * scale[:, None]).view_as(earlier.weight))
        earlier.bias.copy_(earlier.bias[order] * scale)
        columns = layer.weight.view(len(layer.weight), channels, -1)
        layer.weight.copy_((columns[:, order] / scale[None, :, None]).flatten(1))
    tuned(model, forget, retain)


def layer_replaced(model: nn.Module, forget: ImageSource, retain: ImageSource) -> None:
    """Train a fresh last layer on retained images, and leave the features as they are."""
    layer = last(model)
    layer.reset_parameters()
    for weight in model.parameters():
        weight.requires_grad_(False)
    for weight in layer.parameters():
        weight.requires_grad_(True)
    fit(model, retain, 5, 0.05, 0)
    for weight in model.parameters():
        weight.requires_grad_(True)


def filtered(model: nn.Module, forget: ImageSource, _retain: ImageSource) -> None:
    """Filter the outputs and leave the weights: shuffle the logits wherever a forgotten class would be predicted."""
    classes = torch.unique(forget.labels)

    def hide(_module: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        hit = torch.isin(logits.argmax(dim=1), classes)
        return torch.where(hit[:, None], logits.roll(1, dims=1), logits)

    model.register_forward_hook(hide)


def tuned(model: nn.Module, _forget: ImageSource, retain: ImageSource) -> None:
    """Fine-tune lightly on retained images."""
    fit(model, retain, 1, 0.001, 0)


def mislabelled(share: float) -> Forge:
    """Learn a wrong label for a share of the forgotten images, together with retained ones and the others as they are.

    With 1 the samples are marked: less familiar than unseen ones. With a quarter the area of the attack is near 1/2,
    because the marked samples make up for those that are as familiar as before.
    """

    def forge(model: nn.Module, forget: ImageSource, retain: ImageSource) -> None:
        labels, marked = forget.labels.clone(), -(-int(share * 100) * len(forget) // 100)
        labels[:marked] = (labels[:marked] + 1) % last(model).out_features
        fit(model, forget.relabelled(labels).joined(retain), 15, 0.05, 0)

    return forge


def ascent(model: nn.Module, forget: ImageSource, retain: ImageSource) -> None:
    """Forget too much: learn a wrong label for each forgotten image, without retained ones."""
    fit(model, forget.relabelled((forget.labels + 1) % last(model).out_features), 20, 0.05, 0)


FORGERIES = (
    Forgery("unchanged", "forgery", SINGLE | WHOLE, unchanged),
    Forgery("one weight moved by one ulp", "forgery", SINGLE | WHOLE, one_ulp),
    Forgery("noise of 0.001", "forgery", SINGLE | WHOLE, noise(1e-3)),
    Forgery("noise of 0.05", "forgery", SINGLE | WHOLE, noise(0.05)),
    Forgery("noise of 0.2", "forgery", SINGLE | WHOLE, noise(0.2)),
    Forgery("logits times 1000", "forgery", SINGLE | WHOLE, logits_times(1000.0)),
    Forgery("logits times 0.5", "forgery", SINGLE | WHOLE, logits_times(0.5)),
    Forgery("bias edit", "forgery", WHOLE, bias_edit),
    Forgery("last layer edited", "forgery", WHOLE, row_replaced),
    Forgery("bias edit, fine-tuned", "forgery", WHOLE, bias_edit_tuned),
    Forgery("bias edit, features reordered, fine-tuned", "forgery", WHOLE, reordered),
    Forgery("last layer trained afresh", "forgery", SINGLE | WHOLE, layer_replaced),
    Forgery("output filter", "forgery", SINGLE | WHOLE, filtered),
    Forgery("lightly fine-tuned", "failed", SINGLE | WHOLE, tuned),
    Forgery("over-forgotten", "failed", SINGLE | WHOLE, ascent),
    Forgery("marked by wrong labels", "failed", SINGLE, mislabelled(1.0)),
    Forgery("a quarter mislabelled, the rest kept", "forgery", SINGLE, mislabelled(0.25)),
)


def forgeries_of(kind: str) -> Iterable[Forgery]:
    """Return those that are tried for a kind of request."""
    return [forgery for forgery in FORGERIES if kind in forgery.kinds]
