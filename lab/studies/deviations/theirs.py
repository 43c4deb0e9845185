"""The behaviours of the published code that this repository does not have, restated from their description."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSet, random_flip
from salun_core.evaluation.outputs import Outputs
from salun_core.methods.classification import boundary_shrink, salun_soft
from salun_core.methods.classification.method import ClassifierContext, cross_entropy
from salun_core.methods.classification.random_label import phases as random_label_phases
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import Phase, Step, run_loop
from salun_core.saliency import SaliencyMask
from salun_core.saliency.scores import scoring

Phases = Callable[[ClassifierContext, torch.Generator], Sequence[Phase]]


def trained(
    model: nn.Module, context: ClassifierContext, phases: Phases, mask: SaliencyMask | None = None
) -> nn.Module:
    """Run the loop with given phases on a copy of a model; θ_o is in the context."""
    started = copy.deepcopy(model)
    return trained_in_place(
        started, replace(context, original=copy.deepcopy(model).requires_grad_(False)), phases, mask
    )


def trained_in_place(
    model: nn.Module, context: ClassifierContext, phases: Phases, mask: SaliencyMask | None = None
) -> nn.Module:
    """Run the loop on a model."""
    begun = replace(context, model=model)
    run_loop(model, lambda epoch, generator: phases(replace(begun, epoch=epoch), generator), context.config, mask)
    return model


def any_labels(context: ClassifierContext, generator: torch.Generator) -> Tensor:
    """Draw a label for each forget image, uniform over all classes."""
    return torch.randint(0, context.num_classes, (len(context.forget),), generator=generator)


def labels_of_all_classes(context: ClassifierContext, generator: torch.Generator) -> Sequence[Phase]:
    """Random labelling whose labels may be the true ones."""
    labels = any_labels(context, generator)
    return [context.phase("forget", context.forget.relabelled(labels)), context.phase("retain", context.retain)]


def scores_by_batch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Magnitudes of the sum over batches of each batch's mean gradient: a short batch weighs as much as a full one."""
    with scoring(model):
        for inputs, labels in batches:
            cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        return {
            name: weight.grad.detach().abs() for name, weight in model.named_parameters() if weight.grad is not None
        }


def augmented_once(images: ImageSet, seed: int) -> ImageSet:
    """Augment each image once: padded by an eighth of its side, cropped at random, mirrored half of the time."""
    generator = torch.Generator().manual_seed(seed)
    side = images.images.shape[-1]
    padded = torch.nn.functional.pad(images.images, (side // 8,) * 4)
    corners = torch.randint(0, 2 * (side // 8) + 1, (len(images), 2), generator=generator).tolist()
    cut = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, corners, strict=True)]
    return ImageSet(random_flip(torch.stack(cut), generator), images.labels, images.normalisation)


def only_gradient_masked(model: nn.Module, context: ClassifierContext, mask: SaliencyMask) -> nn.Module:
    """SalUn whose momentum and weight decay act on every weight."""
    started = copy.deepcopy(model)
    for name, weight in started.named_parameters():
        keep = mask.tensor(name).to(weight.dtype)
        weight.register_hook(partial(torch.mul, keep))  # type: ignore[no-untyped-call]
    return trained_in_place(started, context, random_label_phases)


def label_blind_entropy(outputs: Outputs) -> np.ndarray:
    """-Σ_i (1 - p_i) log p_i: every class is treated as the true one, with log p instead of log (1 - p)."""
    p = outputs.probabilities
    return np.asarray(-((1 - p) * np.log(np.clip(p, 1e-30, 1))).sum(axis=1))


def label_of_rounded_step(
    context: ClassifierContext, images: Tensor, labels: Tensor, exclude: bool, rounded: bool
) -> Tensor:
    """Return the class that a step of the fast gradient sign method leads to."""
    assert context.original is not None
    inputs = images.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(cross_entropy(context.original(inputs), labels), inputs)
    with torch.no_grad():
        scale = context.forget.normalisation
        moved = boundary_shrink.stepped(images, slope.sign(), context.config.adversarial_step, scale)
        if rounded and scale is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (scale.mean, scale.std))
            moved = (((moved * std + mean) * 255).round() / 255 - mean) / std
        logits: Tensor = context.original(moved)
        return (logits.scatter(1, labels[:, None], -torch.inf) if exclude else logits).argmax(dim=1)


def shrink_with_true_labels(context: ClassifierContext, generator: torch.Generator) -> Sequence[Phase]:
    """Boundary shrinking, rounded to 256 levels, towards the true label where the step stays in its class."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        nearest = label_of_rounded_step(context, images, labels, exclude=False, rounded=True)
        return cross_entropy(model(images), nearest)

    return [context.phase("forget", context.forget, loss)]


def one_running_vector(gradients: Iterable[Tensor], vector: Tensor, count: int) -> Tensor:
    """Return v, corrected along the first gradient o alone; gradients are those of single images, flat, and count is N.

    For each further gradient g, k loses (k·g) / (N + o·g) times o, and o shrinks by N / (N + o·g).
    """
    product, running = vector.clone(), None
    for gradient in gradients:
        if running is None:
            running = gradient.clone()
            continue
        overlap = running @ gradient
        product -= (product @ gradient) / (count + overlap) * running
        running *= count / (count + overlap)
    return product


def softened_by_epoch(context: ClassifierContext, generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch of random labelling, softened after each step with a share that falls once per epoch."""
    return [_softened(phase, context) for phase in random_label_phases(context, generator)]


def _softened(inner: Phase, context: ClassifierContext) -> Phase:
    model, original, config = context.model, context.original, context.config
    whole = config.epochs * inner.steps
    share = (1 - config.soft_density) * (1 - context.epoch / config.epochs - 1 / whole)

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        assert model is not None
        assert original is not None
        for step in inner.draw(generator, group):
            yield step
            salun_soft.shrink(model, original, share)

    return replace(inner, draw=draw)


def fisher_by_batch(model: nn.Module, images: ImageSet, batch_size: int) -> dict[str, Tensor]:
    """Mean over batches of the squares of each batch's mean gradient; a short batch counts as a full one."""
    squares = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    batches = math.ceil(len(images) / batch_size)
    with scoring(model):
        for inputs, labels in images.batches(batch_size):
            model.zero_grad()
            cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    squares[name].addcmul_(weight.grad, weight.grad, value=1 / batches)
    return squares


def salient_by_batch(model: nn.Module, context: ClassifierContext, config: UnlearnConfig) -> dict[str, Tensor]:
    """The mask of SFR-on from squares of batch means on augmented images."""
    forget, retain = (
        fisher_by_batch(model, augmented_once(images, config.seed), config.batch_size)
        for images in (context.forget, context.retain)
    )
    return {name: forget[name] + 1e-15 >= config.saliency_ratio * (retain[name] + 1e-15) for name in forget}
