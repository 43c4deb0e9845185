"""The cells of classifiers: small nets that memorise noisy digits.

An honest model is retrained without the forget set, with another seed, batch size and order than the model before: the
exact answer. It is judged as if it were unlearned, because the policy passes what it knows to be retrained more easily.
The nets are small and the digits of scikit-learn get noise, so that they memorise what they cannot generalise (accuracy
100 % in training and about 85 % on unseen images).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from lab.calibration import Cell, Judged
from lab.calibration.forgeries import DECAY, MOMENTUM, forgeries_of
from salun_core.data import DataSpec, ImageSet, ImageSource, load_data
from salun_core.evaluation import Splits
from salun_core.evaluation.classifier import Comparison, measured_metrics, split_outputs
from salun_core.evaluation.evidence import Evidence, Forgotten, Measured
from salun_core.evaluation.integrity import compare_weights
from salun_core.evaluation.outputs import Outputs
from salun_core.methods.classification import METHODS, method_config, unlearn
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency.scores import CHUNK

MODELS = 40  # of each population in each cell
CLASSES, CLASS = 10, 3
RATE = 0.05
BATCHES = (64, 48, 96)  # of honest models, in turn; the models before have the first
TRAIN, PIXEL_NOISE = 900, 90.0  # of 255
UNLIKE = 1000  # added to seeds of retrained models, so that none starts like the model before
OWN = {"SalUn, fixed recipe": "salun", "SCRUB with its defaults": "scrub"}
DENSITY = 0.5  # as `salun mask` chooses it

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(labels of the training images, generator) -> indices of the forget set."""
Net = Callable[[], nn.Module]


def samples(count: int) -> Draw:
    """Draw so many images at random."""
    return lambda labels, rng: rng.permutation(len(labels))[:count]


def whole_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return all images of one class."""
    return np.flatnonzero(labels == CLASS)


def subject(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the images of a person who wrote two digits often and all others rarely."""
    weights = np.where(np.isin(labels, rng.permutation(CLASSES)[:2]), 10.0, 1.0)
    return rng.choice(len(labels), 60, replace=False, p=weights / weights.sum())


def dense() -> nn.Module:
    """Return a net of two linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def convolutional() -> nn.Module:
    """Return a net of two convolutions and one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


EPOCHS: Mapping[Net, int] = {dense: 40, convolutional: 30}
"""Passes after which a net has memorised its images."""


class Request(NamedTuple):
    """One model before and what it has to forget; the same request has the same model in every call.

    `splits` are D_f, D_r and unseen images; `outputs` are those of the model before.
    """

    seed: int
    before: nn.Module
    splits: Splits
    outputs: dict[str, Outputs]


@cache
def _data() -> tuple[ImageSet, ImageSet]:
    """Return the images to train on and unseen ones, both with noise."""
    data = load_data(DataSpec(source="digits", validation_fraction=0.0, test_fraction=0.4))
    pool = _noisy(data.image_set("train"), 1)
    return pool, _noisy(data.image_set("test", pool.normalisation), 2)


def _noisy(images: ImageSet, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    noise = PIXEL_NOISE * torch.randn(images.images.shape, generator=generator)
    pixels = (images.images.float() + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(pixels, images.labels, images.normalisation)


@cache
def _starts(net: Net, models: int) -> list[tuple[ImageSet, nn.Module]]:
    """Return the images that each model before saw, and the model: every cell of a process uses them."""
    pool, _ = _data()
    orders = [np.random.default_rng(seed).permutation(len(pool))[:TRAIN] for seed in range(models)]
    sets = [pool.select(order.tolist()) for order in orders]
    return list(zip(sets, trained(net, sets, range(models), BATCHES[0]), strict=True))


def trained(net: Net, sets: Sequence[ImageSource], seeds: Sequence[int], batch: int) -> list[nn.Module]:
    """Train nets at once until they have memorised their images, and return them in eval mode.

    A pass leaves out what does not fill a batch of the smallest set.
    """
    nets: list[nn.Module] = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(net())
    stacked, _ = stack_module_state(nets)
    weights = {name: stack.detach() for name, stack in stacked.items()}
    speeds = {name: torch.zeros_like(stack) for name, stack in weights.items()}
    shape = copy.deepcopy(nets[0]).to("meta")

    def loss(of_one: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(shape, of_one, (inputs,)), labels)

    slopes, steps = vmap(grad(loss)), min(map(len, sets)) // batch
    floats = [next(iter(images.batches(len(images)))) for images in sets]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(EPOCHS[net]):
        orders = [
            torch.randperm(len(images), generator=one)[: steps * batch]
            for images, one in zip(sets, generators, strict=True)
        ]
        inputs, labels = (
            torch.stack([one[part][order] for one, order in zip(floats, orders, strict=True)]) for part in (0, 1)
        )
        for chosen in torch.split(torch.arange(steps * batch), batch):
            slope = slopes(weights, inputs[:, chosen], labels[:, chosen])
            for name, weight in weights.items():
                speeds[name].mul_(MOMENTUM).add_(slope[name]).add_(weight, alpha=DECAY)
                weight.add_(speeds[name], alpha=-RATE)
    for place, one in enumerate(nets):
        one.load_state_dict({name: stack[place] for name, stack in weights.items()})
    return [one.eval() for one in nets]


def retrained(net: Net, asked: Sequence[Request]) -> list[nn.Module]:
    """Retrain a net for each request without its D_f, with another seed, order and mostly batch size than before."""
    found: dict[int, nn.Module] = {}
    for place, batch in enumerate(BATCHES):
        chosen = [one for one in asked if one.seed % len(BATCHES) == place]
        if chosen:
            nets = trained(net, [one.splits.retain for one in chosen], [UNLIKE + one.seed for one in chosen], batch)
            found |= {one.seed: model for one, model in zip(chosen, nets, strict=True)}
    return [found[one.seed] for one in asked]


def request(kind: str, net: Net, draw: Draw, seed: int, models: int) -> Request:
    """Return a model before, and draw what it has to forget."""
    images, before = _starts(net, models)[seed]
    gone = draw(images.labels.numpy(), np.random.default_rng((seed, len(kind))))
    kept = np.setdiff1d(np.arange(len(images)), gone)
    splits = Splits(images.select(gone.tolist()), images.select(kept.tolist()), _data()[1])
    return Request(seed, before, splits, split_outputs(before, splits))


def evidence_of(kind: str, asked: Request, after: nn.Module) -> Evidence:
    """Evaluate a model on a request: what the shipped policy judges, without attacks and figures that it does not."""
    splits, models = asked.splits, {"before": asked.before, "after": after}
    emptied = sorted(set(splits.forget.labels.tolist()) - set(splits.retain.labels.tolist()))
    count = len(splits.forget)
    forgotten = Forgotten(
        count=count,
        train_count=count + len(splits.retain),
        kinds=[kind],
        classes=emptied,
        in_classes=int(np.isin(splits.forget.labels.numpy(), emptied).sum()),
    )
    outputs = {"before": asked.outputs, "after": split_outputs(after, splits)}
    return Evidence(
        created_at="",
        measured=Measured(before="before", after="after", dataset="", split="", forget_set=""),
        forgotten=forgotten,
        integrity=compare_weights(asked.before, after),
        metrics=measured_metrics(Comparison(models, outputs, splits, forgotten), most=1),
    )


def unlearned(method: str, asked: Request) -> nn.Module:
    """Unlearn with a method of the product: its defaults, and the fixed recipe where it has two."""
    forget, retain = asked.splits.forget, asked.splits.retain
    mask = None
    if METHODS[method].needs_mask:
        scores = saliency_scores(asked.before, forget.batches(CHUNK), nn.functional.cross_entropy)
        mask = SaliencyMask.from_scores(scores, DENSITY)
    config = method_config(method, {"seed": asked.seed, "device": "cpu"})
    return unlearn(asked.before, method, forget=forget, retain=retain, config=config, mask=mask).model


def measure(kind: str, net: Net, draw: Draw, models: int) -> Iterator[Judged]:
    """Yield the evidence of all models of a cell."""
    requests = [request(kind, net, draw, seed, models) for seed in range(models)]
    for asked, honest in zip(requests, retrained(net, requests), strict=True):
        forget, retain = asked.splits.forget, asked.splits.retain
        yield Judged("retrained", "honest", evidence_of(kind, asked, honest))
        for name, method in OWN.items():
            yield Judged(name, "own", evidence_of(kind, asked, unlearned(method, asked)))
        for forgery in forgeries_of(kind):
            after = copy.deepcopy(asked.before)
            torch.manual_seed(asked.seed)
            forgery.forge(after, forget, retain)
            yield Judged(forgery.name, forgery.sort, evidence_of(kind, asked, after.eval()))


def classifier_cells() -> Iterator[Cell]:
    """Return the cells of classifiers."""
    cells: list[tuple[str, str, Net, Draw]] = [
        *((f"{count} samples", "samples", dense, samples(count)) for count in (5, 20, 50, 200)),
        ("subject", "subject", dense, subject),
        ("class", "class", dense, whole_class),
        ("class, convolutional", "class", convolutional, whole_class),
    ]
    for name, kind, net, draw in cells:
        yield Cell(name, kind, "classifier", MODELS, partial(measure, kind, net, draw))
