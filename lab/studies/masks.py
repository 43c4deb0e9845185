"""Measures what the saliency mask brings: SalUn's mask against controls and candidates, everything else equal.

    python -m lab.studies.masks --data FOLDER --out OUT   # measures what is missing; FOLDER has cifar10/ and faces/
    python -m lab.studies.masks --out OUT --plan          # shows what is missing
    python -m lab.studies.masks --out OUT --write         # writes the results, the tables and the figure
    python -m lab.studies.masks --check                   # fails if the page is out of step with the results

A cell is one mask at one learning rate and seed. Base models and retrained references are those of the bench's suites.
The metrics are the bench's, the held-out objective is the tuner's. Each cell is written when it is measured: a killed
run loses one cell, and the next run continues. Only complete parts enter the tables.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lab.bench.plan import SuiteRun
from lab.bench.plot import standalone
from lab.bench.prepared import Preparation, reference_name
from lab.bench.results import difference, machine
from lab.bench.suite import BaseModelSpec, Size, Suite, find_suite, load_suite
from salun_core.data import DataSpec, ImageSet
from salun_core.data.targets import SamplesTarget
from salun_core.digest import sha256_bytes
from salun_core.evaluation import Metric, Splits
from salun_core.evaluation.classifier import metric_shares, split_outputs
from salun_core.evaluation.membership import match_classes, matched_area
from salun_core.evaluation.statistics import average_gap
from salun_core.methods.classification import unlearn
from salun_core.methods.classification.random_label import wrong_labels
from salun_core.methods.classification.rum import partition
from salun_core.models import LoadedModel
from salun_core.report.plots import COLOURS, draw
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.storage.local_files import write_whole
from salun_core.tasks import open_inputs, task_of
from salun_core.tasks.classification.inputs import ClassifierInputs
from salun_core.tuning.objective import Reading, Sets, distance

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "lab/results/masks.json", ROOT / "docs/research/saliency.md"
FIGURE = ROOT / "docs/research/images/saliency.svg"
Plain = dict[str, Any]
Scores = dict[str, Tensor]
METRICS = ("UA", "RA", "TA", "MIA")
CHUNK = 256  # images of a batch of scores
EPOCHS = 5
FIXED = {"order": "mixed", "batch_norm": "update"}
OWN: Mapping[str, Plain] = {
    "salun": {"epochs": EPOCHS, **FIXED},
    "salun_lotus": {"batch_norm": "update"},
}
REFERENCES = 3  # retrained models of a seed
MOST_ADDED = 5  # rates beyond the grid


# Masks -----------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """The model to unlearn from and its images, at one seed; `held_out` is the validation split."""

    model: nn.Module
    forget: ImageSet
    retain: ImageSet
    held_out: ImageSet
    seed: int

    @cached_property
    def scores(self) -> Scores:
        """SalUn's scores."""
        return scores_on(self.model, self.forget)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}


def scores_on(model: nn.Module, images: ImageSet) -> Scores:
    """Return |gradient of the mean loss| over images."""
    return saliency_scores(model, images.batches(CHUNK), nn.functional.cross_entropy, samples=len(images))


def salient(subject: Subject, density: float) -> SaliencyMask:
    """Return SalUn's mask."""
    return SaliencyMask.from_scores(subject.scores, density)


def uniform(subject: Subject, density: float) -> SaliencyMask:
    """Draw a uniform random mask."""
    return SaliencyMask.random(subject.shapes, density, subject.seed)


def like_layers(mask: SaliencyMask, seed: int) -> SaliencyMask:
    """Draw a random mask that has exactly as many weights of each parameter as a mask."""
    rng, bits = np.random.default_rng(seed), {}
    for name, shape in mask.shapes.items():
        chosen = np.zeros(math.prod(shape), dtype=np.bool_)
        count = int(np.bitwise_count(mask.bits[name]).sum())
        chosen[rng.choice(len(chosen), size=count, replace=False)] = True
        bits[name] = np.packbits(chosen, bitorder="little")
    return SaliencyMask(mask.shapes, bits, mask.k, {"scores": "random by layer"})


def complement(mask: SaliencyMask) -> SaliencyMask:
    """Return the mask of all other weights."""
    bits = {
        name: np.packbits(~mask.tensor(name).flatten().numpy(), bitorder="little") for name in mask.shapes
    }  # not ~bits: padding stays 0
    return SaliencyMask(mask.shapes, bits, mask.weights - mask.k, {"scores": "complement"})


def least(subject: Subject, density: float) -> SaliencyMask:
    """Return the weights with the lowest scores."""
    return complement(SaliencyMask.from_scores(subject.scores, 1 - density))


def of_retained(subject: Subject, density: float) -> SaliencyMask:
    """Return the mask from as many retained images as D_f has."""
    drawn = torch.randperm(len(subject.retain), generator=torch.Generator().manual_seed(subject.seed))
    images = subject.retain.select(drawn[: len(subject.forget)])
    return SaliencyMask.from_scores(scores_on(subject.model, images), density)


def of_wrong_labels(subject: Subject, density: float) -> SaliencyMask:
    """Return the mask from the loss that random labelling descends on D_f."""
    classes = int(max(subject.forget.labels.max(), subject.retain.labels.max())) + 1
    generator = torch.Generator().manual_seed(subject.seed)
    images = subject.forget.relabelled(wrong_labels(subject.forget.labels, classes, generator))
    return SaliencyMask.from_scores(scores_on(subject.model, images), density)


def every(subject: Subject, density: float) -> SaliencyMask:
    """Return the mask of all weights, whatever the density."""
    return SaliencyMask.full(subject.shapes)


def of_changes(before: nn.Module, after: nn.Module, density: float) -> SaliencyMask:
    """Return the weights that changed most from one model to another."""
    ended = dict(after.named_parameters())
    changes = {name: (ended[name] - value).detach() for name, value in before.named_parameters()}
    return SaliencyMask.from_scores({name: change.contiguous() for name, change in changes.items()}, density)


def per_sample_moments(model: nn.Module, images: ImageSet, weights: Tensor) -> tuple[Scores, Scores]:
    """Return the weighted mean and variance of the images' gradients, float64, by parameter; weights: float [N]."""
    network = copy.deepcopy(model).eval()
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(values: Scores, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (values, buffers), (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    first = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in parameters.items()}
    second = {name: value.clone() for name, value in first.items()}
    share, start = weights.double() / weights.double().sum(), 0
    for inputs, labels in images.batches(64):
        part = share[start : start + len(labels)]
        start += len(labels)
        for name, found in each(parameters, inputs.contiguous(), labels).items():
            wide = found.double()
            first[name] += torch.tensordot(part, wide, dims=1)
            second[name] += torch.tensordot(part, wide**2, dims=1)
    return first, {name: (second[name] - first[name] ** 2).clamp(min=0) for name in first}


def apart(subject: Subject, density: float) -> SaliencyMask:
    """Return the weights in which gradients of D_f and of held-out images of the same classes differ most.

    The score is |difference of the means| / standard deviation, as of a two-sample test; held-out images are weighted
    to the class histogram of D_f.
    """
    weights = match_classes(subject.forget.labels.numpy(), subject.held_out.labels.numpy()).weights
    asked, spread = per_sample_moments(subject.model, subject.forget, torch.ones(len(subject.forget)))
    unseen, other = per_sample_moments(subject.model, subject.held_out, torch.from_numpy(weights))
    scores = {
        name: (asked[name] - unseen[name]).abs() / ((spread[name] + other[name]).sqrt() + 1e-12) for name in asked
    }
    return SaliencyMask.from_scores(scores, density)


def of_channels(subject: Subject, density: float) -> SaliencyMask:
    """Return the channels with the largest mean |w g|; a weight outside matrices and kernels is its own channel."""
    scores = {}
    for name, weight in subject.model.named_parameters():
        product = (weight.detach() * subject.scores[name]).abs()
        if product.dim() > 1:
            mean = product.flatten(1).mean(dim=1).reshape(-1, *[1] * (product.dim() - 1))
            product = mean.expand_as(product).contiguous()
        scores[name] = product
    return SaliencyMask.from_scores(scores, density)


@dataclass(frozen=True)
class Run:
    """The model that one cell made, with its last mask.

    `passes` counts images forward and backward, also the mask's.
    """

    model: nn.Module
    mask: SaliencyMask
    passes: int


def train(subject: Subject, mask: SaliencyMask, method: str, rate: float, **changes: Any) -> tuple[nn.Module, int]:  # noqa: ANN401
    """Unlearn with a mask; returns the model and the passes."""
    config = {**OWN[method], "learning_rate": rate, "seed": subject.seed, **changes}
    result = unlearn(
        subject.model,
        method,
        forget=subject.forget,
        retain=subject.retain,
        held_out=subject.held_out,
        config=config,
        mask=mask,
    )
    return result.model, result.passes


Kind = Callable[[Subject, float, str, float], Run]
"""(subject, density, method, rate) -> the run with a kind of mask."""


def fixed_mask(make: Callable[[Subject, float], SaliencyMask], cost: Callable[[Subject], int] = lambda _: 0) -> Kind:
    """Return the kind of a mask that does not depend on the rate; `cost` is that of its scores, in passes."""

    def run(subject: Subject, density: float, method: str, rate: float) -> Run:
        mask = make(subject, density)
        model, passes = train(subject, mask, method, rate)
        return Run(model, mask, passes + cost(subject))

    return run


def after_dense_epoch(subject: Subject, density: float, method: str, rate: float, control: bool = False) -> Run:
    """Train one epoch without a mask, and restart with the weights that changed most, at the same rate.

    `control` draws a random mask with the same density in each layer.
    """
    dense, spent = train(subject, every(subject, 1.0), method, rate, epochs=1)
    mask = of_changes(subject.model, dense, density)
    mask = like_layers(mask, subject.seed) if control else mask
    model, passes = train(subject, mask, method, rate)
    return Run(model, mask, passes + spent)


def each_epoch(subject: Subject, density: float, method: str, rate: float, control: bool = False) -> Run:
    """Before each epoch, train one without a mask, undo it, and use the weights that it changed most."""
    current, total, mask = subject, 0, None
    for epoch in range(EPOCHS):
        seed = subject.seed + 1000 * epoch  # the epochs' order and labels differ, as within one run
        dense, spent = train(current, every(current, 1.0), method, rate, epochs=1, seed=seed)
        mask = of_changes(current.model, dense, density)
        mask = like_layers(mask, seed) if control else mask
        model, passes = train(current, mask, method, rate, epochs=1, seed=seed)
        current, total = Subject(model, *vars_of(subject)), total + spent + passes
    assert mask is not None
    return Run(current.model, mask, total)


def vars_of(subject: Subject) -> tuple[ImageSet, ImageSet, ImageSet, int]:
    """Return what a subject has besides the model."""
    return subject.forget, subject.retain, subject.held_out, subject.seed


def of_forget(subject: Subject) -> int:
    """Return the passes of scores on D_f."""
    return len(subject.forget)


def layers_of(make: Callable[[Subject, float], SaliencyMask]) -> Callable[[Subject, float], SaliencyMask]:
    """Return the random mask with the density of another mask in each layer."""
    return lambda subject, density: like_layers(make(subject, density), subject.seed)


KINDS: Mapping[str, tuple[str, Kind]] = {
    "saliency": ("SalUn's mask", fixed_mask(salient, of_forget)),
    "layers": ("random, SalUn's density by layer", fixed_mask(layers_of(salient), of_forget)),
    "random": ("random, uniform", fixed_mask(uniform)),
    "retained": ("gradient of retained images", fixed_mask(of_retained, of_forget)),
    "wrong": ("gradient of the random-label loss", fixed_mask(of_wrong_labels, of_forget)),
    "least": ("least salient", fixed_mask(least, of_forget)),
    "none": ("all weights", fixed_mask(every)),
    "change": ("largest change after a dense epoch", after_dense_epoch),
    "change-layers": ("random, its density by layer", partial(after_dense_epoch, control=True)),
    "epochs": ("the same before each epoch", each_epoch),
    "epochs-layers": ("random, its density by layer", partial(each_epoch, control=True)),
    "apart": (
        "D_f against held-out, per sample",
        fixed_mask(apart, lambda subject: len(subject.forget) + len(subject.held_out)),
    ),
    "apart-layers": ("random, its density by layer", fixed_mask(layers_of(apart))),
    "channels": ("whole channels by weight times gradient", fixed_mask(of_channels, of_forget)),
    "channels-layers": ("random, its density by layer", fixed_mask(layers_of(of_channels))),
}
"""Title and run of each kind of mask."""


# Regimes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """Models, data and forget set.

    Args:
        title: on the page.
        suite: a suite of the bench; its rows do not count.
        data: folder with its data below `--data`; None if the suite names data without a path.
        base_of: regime whose base models are used, if they are the same.
        memorised: forget the tenth of the training images that is memorised most, instead of the suite's forget set.
        replaced: parts of the suite's size that differ; a source `noisy-digits` is written by this script.
        seeds: of base, draw and method.
    """

    title: str
    suite: str
    data: str | None
    base_of: str | None = None
    memorised: bool = False
    replaced: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)


DIGITS, NOISE = "noisy-digits", 60.0  # of 255: the net memorises what it cannot generalise
OF_DIGITS = {"data": DataSpec(source=DIGITS, validation_fraction=0.1667)}
OF_CLOTHES = {
    "data": DataSpec(
        source="fashion-mnist", size=14, channels=1, train_limit=12000, test_limit=2000, validation_fraction=0.1667
    ),
    "model": BaseModelSpec(architecture="resnet8", training={"epochs": 20}),
}
FIVE = (0, 1, 2, 3, 4)
REGIMES: Mapping[str, Regime] = {
    "digits-random10": Regime(
        "digits with noise, random 10 %", "cifar10-random10", None, replaced=OF_DIGITS, seeds=FIVE
    ),
    "digits-memorised": Regime(
        "digits with noise, the 10 % most memorised",
        "cifar10-random10",
        None,
        base_of="digits-random10",
        memorised=True,
        replaced=OF_DIGITS,
        seeds=FIVE,
    ),
    "cifar10-random10": Regime("CIFAR-10, random 10 %", "cifar10-random10", "cifar10"),
    "cifar10-memorised": Regime(
        "CIFAR-10, the 10 % most memorised", "cifar10-random10", "cifar10", base_of="cifar10-random10", memorised=True
    ),
    "cifar10-class": Regime("CIFAR-10, a class", "cifar10-class", "cifar10", base_of="cifar10-random10"),
    "faces-subject": Regime("faces, a person", "faces-subject", "faces"),
    "fashion-random10": Regime("Fashion-MNIST, random 10 %", "cifar10-random10", None, replaced=OF_CLOTHES),
}


def write_digits(path: Path) -> None:
    """Write scikit-learn's digits with noise as a parquet file, always the same."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    noise = NOISE * np.random.default_rng(0).standard_normal(digits.images.shape)
    rows = []
    for pixels in (digits.images * 15.9375 + noise).clip(0, 255).astype(np.uint8):
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "png")
        rows.append(encoded.getvalue())
    labels = [str(label) for label in digits.target]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": labels}), path)


@dataclass(frozen=True)
class Part:
    """A table: masks of one density in one regime.

    Rates ascend, and the first kind is the reference of all differences.
    """

    regime: str
    name: str
    density: float
    rates: Sequence[float]
    kinds: Sequence[str]
    method: str = "salun"

    @property
    def title(self) -> str:
        """Heading on the page."""
        method = " with LoTUS' objective" if self.method == "salun_lotus" else ""
        return f"{REGIMES[self.regime].title}: density {self.density:g}{method}"


MAIN = ("saliency", "layers", "random", "retained", "least", "none", "wrong")
PAIRS = tuple(name for kind in ("change", "epochs", "apart", "channels") for name in (kind, f"{kind}-layers"))
PARTS: Sequence[Part] = (
    Part("digits-random10", "half", 0.5, (0.00125, 0.0025, 0.005, 0.01, 0.02), MAIN),
    Part("cifar10-random10", "half", 0.5, (0.01, 0.02, 0.04), MAIN),
    Part("digits-random10", "candidates", 0.5, (0.005, 0.01), PAIRS),
    Part("digits-random10", "sparse", 0.1, (0.0025, 0.005, 0.01, 0.02), ("saliency", "layers", "random")),
    Part("digits-random10", "lotus", 0.5, (0.00111, 0.00333, 0.0111), ("saliency", "layers"), "salun_lotus"),
    Part("digits-memorised", "half", 0.5, (0.005, 0.01), ("saliency", "layers")),
    Part("cifar10-random10", "candidates", 0.5, (0.02, 0.04), PAIRS),
    Part("faces-subject", "half", 0.5, (0.01, 0.02), MAIN),
    Part("cifar10-random10", "lotus", 0.5, (0.001, 0.00333), ("saliency", "layers"), "salun_lotus"),
    Part("cifar10-random10", "sparse", 0.1, (0.04, 0.08), ("saliency", "layers", "random")),
    Part("fashion-random10", "half", 0.5, (0.01, 0.02), ("saliency", "layers", "random", "retained", "least", "none")),
    Part("cifar10-memorised", "half", 0.5, (0.02, 0.04), ("saliency", "layers")),
    Part("cifar10-class", "half", 0.5, (0.01, 0.02), ("saliency", "layers", "random", "least", "none")),
)
"""In the order in which they are measured."""


# Measuring ---------------------------------------------------------------------------------------------------------


def figures(model: nn.Module, splits: Splits, classes: Sequence[int]) -> Plain:
    """Return UA, RA, TA, MIA and the attack's AUC of a model, as the bench's evidence has them.

    `classes` are those of which nothing is retained.
    """
    found = split_outputs(model, splits)
    test, forget = found["test"], found["forget"]
    kept = test.where(~np.isin(test.labels, classes))
    shares = metric_shares({**found, "test": kept})
    single = ~np.isin(forget.labels, classes)
    attacked = forget.where(single) if single.any() else forget
    return {
        **{name: float(shares[name].mean()) for name in METRICS},
        "attack_auc": matched_area(attacked, test),
    }


def gap(found: Mapping[str, float], references: Sequence[Mapping[str, float]]) -> float:
    """Return the average gap in points: the mean over a seed's references, as the bench has it."""
    gaps = []
    for reference in references:
        pairs = {name: Metric.of({"after": found[name], "reference": reference[name]}, 1) for name in METRICS}
        value = average_gap(pairs)
        assert value is not None
        gaps.append(value)
    return 100 * statistics.mean(gaps)


@dataclass
class Seed:
    """What the cells of one regime and seed share; references are retrained models' folders."""

    inputs: ClassifierInputs
    seed: int
    references: Sequence[Path]
    subject: Subject = field(init=False)

    def __post_init__(self) -> None:
        images = self.inputs.forget, self.inputs.retain, self.inputs.held_out
        forget, retain, held_out = (cast(ImageSet, part) for part in images)  # small data are in memory
        self.subject = Subject(self.inputs.original.model.eval(), forget, retain, held_out, self.seed)

    @cached_property
    def splits(self) -> Splits:
        """The images of the evaluation."""
        return Splits(self.inputs.forget, self.inputs.retain, self.inputs.test)

    @cached_property
    def sets(self) -> Sets:
        """The images of the tuner's objective, as the tuner draws them."""
        retain, held_out = self.subject.retain, self.subject.held_out
        known = set(retain.labels.tolist())
        kept = [place for place, label in enumerate(held_out.labels.tolist()) if label in known]
        draw = retain.select(range(min(len(retain), max(500, len(kept)))))
        return Sets(self.subject.forget, draw, held_out.select(kept), self.inputs.emptied)

    @cached_property
    def before(self) -> Reading:
        """The original on the sets of the objective."""
        return self.sets.read(self.subject.model)

    def figures(self, model: nn.Module) -> Plain:
        """Return the figures of a model, and its objective."""
        measured = figures(model, self.splits, self.inputs.emptied)
        return {**measured, "objective": float(distance(self.before, self.sets.read(model)))}

    def fixed(self) -> Plain:
        """Return the figures of the models before and of the references, and the counts."""
        models = [cast(LoadedModel, task_of(folder).load(folder)).model.eval() for folder in self.references]
        return {
            "before": self.figures(self.subject.model),
            "references": [self.figures(model) for model in models],
            "forget": len(self.inputs.forget),
            "retain": len(self.inputs.retain),
        }

    def cell(self, kind: str, density: float, method: str, rate: float) -> Plain:
        """Run one cell."""
        run = KINDS[kind][1](self.subject, density, method, rate)
        energy = {name: score.double() ** 2 for name, score in self.subject.scores.items()}
        held = sum(float(value[run.mask.tensor(name)].sum()) for name, value in energy.items())
        return {
            **self.figures(run.model.eval()),
            "passes": run.passes,
            "energy": held / sum(float(value.sum()) for value in energy.values()),
            "density": run.mask.density,
        }


class Store:
    """Figures of all cells measured so far, in one JSON file that is replaced whole after each cell.

    A process that is killed while it writes leaves the file of before; it loses the one cell.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: Plain = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, measure: Callable[[], Plain]) -> Plain:
        """Return an entry, measured if it is missing."""
        if key not in self.found:
            self.found[key] = measure()
            write_whole(self.path, (json.dumps(self.found, indent=1) + "\n").encode())
        found: Plain = self.found[key]
        return found


def seed_key(regime: str, seed: int) -> str:
    """Return the key of what all cells of a seed share."""
    return f"{regime} seed {seed}"


def cell_key(part: Part, kind: str, rate: float, seed: int) -> str:
    """Return the key of a cell; parts share cells."""
    density = 1.0 if kind == "none" else part.density
    return f"{part.regime} {part.method} {kind} {density:g} rate {rate:g} seed {seed}"


def suite_of(regime: Regime) -> tuple[Suite, Size, Path]:
    """Return the suite of a regime, its cpu size, and the folder of its file."""
    path = find_suite(regime.suite, [ROOT / "lab/suites"])
    suite = load_suite(path)
    return suite, suite.size("cpu").model_copy(update=dict(regime.replaced)), path.parent


def prepared(name: str, seed: int, out: Path, data: Path | None) -> Seed:
    """Return the inputs of a regime's cells at a seed; what is missing is trained.

    `out` is the folder of all regimes, `data` that of all data sets.
    """
    regime = REGIMES[name]
    suite, size, folder = suite_of(regime)
    place = str(data / regime.data) if regime.data and data else None
    whole = out / name
    whole.mkdir(parents=True, exist_ok=True)
    if size.data is not None and size.data.source == DIGITS:
        digits = (out / f"{DIGITS}.parquet").resolve()
        write_digits(digits)
        size = size.model_copy(update={"data": size.data.model_copy(update={"source": str(digits)})})
    if regime.base_of and not (whole / f"base-{seed}.json").exists():
        source = out / regime.base_of
        shutil.copytree(source / f"base-{seed}", whole / f"base-{seed}", dirs_exist_ok=True)
        shutil.copyfile(source / f"base-{seed}.json", whole / f"base-{seed}.json")
    size = size.model_copy(update={"references": REFERENCES})
    if regime.memorised:
        size = size.model_copy(update={"forget": most_memorised(whole / f"base-{seed}", whole, place)})
    run = SuiteRun(suite.model_copy(update={"sizes": {"cpu": size}}), "cpu", folder, place)
    ready = Preparation(run, whole, lambda text: print(f"  {text}", flush=True) if "building" in text else None).ready(
        seed
    )
    references = [whole / reference_name(seed, number) for number in range(REFERENCES)]
    inputs = open_inputs(ready.base, str(ready.forget), place)
    assert isinstance(inputs, ClassifierInputs)
    return Seed(inputs, seed, references)


def most_memorised(base: Path, out: Path, data: str | None) -> SamplesTarget:
    """Return the tenth of the training images that RUM's partition calls memorised most."""
    first = out / "first.json"
    loaded = cast(LoadedModel, task_of(base).load(base))
    ids = loaded.split.ids("train")
    first.write_text(json.dumps({"kind": "samples", "ids": [ids[0]]}))
    inputs = cast(ClassifierInputs, open_inputs(base, str(first), data))
    images = inputs.data.images("train", loaded.normalisation)
    chosen = partition(loaded.model.eval(), images, 10)[-1]
    return SamplesTarget(ids=sorted(images.ids[place] for place in chosen.tolist()))


def measure(parts: Sequence[Part], store: Store, out: Path, data: Path | None) -> None:
    """Measure what is missing: part by part, and within a part mask by mask, so that a stopped run has whole rows."""
    for part in parts:
        shared = {seed: _Lazy(partial(prepared, part.regime, seed, out, data)) for seed in REGIMES[part.regime].seeds}
        known = {seed: store.get(seed_key(part.regime, seed), lazy.fixed) for seed, lazy in shared.items()}
        for kind, seed in product(part.kinds, shared):
            references = known[seed]["references"]
            wanted = statistics.mean(item["UA"] for item in references)
            for rate in rates_of(part, kind, seed, wanted, store.found):
                key = cell_key(part, kind, rate, seed)
                new = key not in store.found
                found = store.get(key, partial(shared[seed].cell, kind, part.density, part.method, rate))
                if new:
                    print(f"{key}: UA {100 * found['UA']:.1f}, gap {gap(found, references):.2f}", flush=True)


class _Lazy:
    """The inputs of a seed, made when they are first needed: a complete part needs no model."""

    def __init__(self, make: Callable[[], Seed]) -> None:
        self._make = make

    @cached_property
    def _value(self) -> Seed:
        return self._make()

    def fixed(self) -> Plain:
        return self._value.fixed()

    def cell(self, kind: str, density: float, method: str, rate: float) -> Plain:
        return self._value.cell(kind, density, method, rate)


def rates_of(part: Part, kind: str, seed: int, wanted: float, found: Mapping[str, Plain]) -> Iterator[float]:
    """Yield the rates of a mask at a seed: the grid, then others until the reference's UA lies between two.

    `wanted` is that UA. The caller adds each rate to `found` before it takes the next.
    """
    yield from part.rates
    if len(part.rates) < 2 or wanted > 0.99:  # a whole class: UA saturates at 1
        return
    rates, factor = list(part.rates), part.rates[1] / part.rates[0]
    for _ in range(MOST_ADDED):
        values = [found[cell_key(part, kind, rate, seed)]["UA"] for rate in rates]
        if min(values) <= wanted <= max(values):
            return
        rate = float(f"{rates[0] / factor if min(values) > wanted else rates[-1] * factor:.3g}")
        yield rate
        rates = sorted([*rates, rate])


# Tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one mask of a part reached, by seed.

    Args:
        equal: gap at each rate of the grid.
        matched: interpolated figures and gap at the reference's UA.
        nearest: seeds at which no rate brackets that UA; they have the rate nearest to it.
        tuned: gap at the rate with the smallest held-out objective.
        rates: these rates.
        energy: share of the gradient's squared norm on D_f that the mask holds.
        passes: of a run.
    """

    equal: Mapping[float, Mapping[int, float]]
    matched: Mapping[int, Plain]
    nearest: frozenset[int]
    tuned: Mapping[int, float]
    rates: Mapping[int, float]
    energy: float
    passes: float

    @property
    def at_equal_ua(self) -> dict[int, float]:
        """Gap at the reference's UA, by seed."""
        return {seed: item["gap"] for seed, item in self.matched.items()}


def matched_figures(cells: Mapping[float, Plain], wanted: float) -> tuple[Plain, bool]:
    """Return the figures where UA equals a value, linear in log(rate), and whether two neighbours bracket it.

    If none do, they are those of the nearest rate.
    """
    rates = sorted(cells)
    for low, high in pairwise(rates):
        ends = cells[low]["UA"], cells[high]["UA"]
        if min(ends) <= wanted <= max(ends):
            share = 0.0 if ends[0] == ends[1] else (wanted - ends[0]) / (ends[1] - ends[0])
            names = (*METRICS, "attack_auc")
            found = {name: (1 - share) * cells[low][name] + share * cells[high][name] for name in names}
            return {**found, "rate": math.exp((1 - share) * math.log(low) + share * math.log(high))}, True
    rate = min(rates, key=lambda rate: abs(cells[rate]["UA"] - wanted))
    return {**cells[rate], "rate": rate}, False


def rows_of(part: Part, found: Mapping[str, Plain]) -> dict[str, Row] | None:
    """Return the rows of a part's complete masks; None if its first mask is incomplete."""
    seeds = REGIMES[part.regime].seeds
    if any(seed_key(part.regime, seed) not in found for seed in seeds):
        return None
    rows = {}
    for kind in part.kinds:
        cells = {seed: cells_of(part, kind, seed, found) for seed in seeds}
        if any(rate not in cells[seed] for seed in seeds for rate in part.rates):
            continue
        references = {seed: found[seed_key(part.regime, seed)]["references"] for seed in seeds}
        gaps = {seed: {rate: gap(item, references[seed]) for rate, item in cells[seed].items()} for seed in seeds}
        wanted = {seed: statistics.mean(item["UA"] for item in references[seed]) for seed in seeds}
        at_ua = {seed: matched_figures(cells[seed], wanted[seed]) for seed in seeds}
        best = {seed: min(part.rates, key=lambda rate, seed=seed: cells[seed][rate]["objective"]) for seed in seeds}  # type: ignore[misc]
        every_cell = [cells[seed][rate] for seed in seeds for rate in part.rates]
        rows[kind] = Row(
            {rate: {seed: gaps[seed][rate] for seed in seeds} for rate in part.rates},
            {seed: {**item, "gap": gap(item, references[seed])} for seed, (item, _) in at_ua.items()},
            frozenset(seed for seed, (_, bracketed) in at_ua.items() if not bracketed),
            {seed: gaps[seed][best[seed]] for seed in seeds},
            best,
            statistics.mean(item["energy"] for item in every_cell),
            statistics.mean(item["passes"] for item in every_cell),
        )
    return rows if part.kinds[0] in rows else None


def cells_of(part: Part, kind: str, seed: int, found: Mapping[str, Plain]) -> dict[float, Plain]:
    """Return the measured cells of a mask at a seed by rate."""
    start, end = cell_key(part, kind, 0, seed).split(" rate 0 ")
    return {
        float(key.removeprefix(f"{start} rate ").removesuffix(f" {end}")): item
        for key, item in found.items()
        if key.startswith(f"{start} rate ") and key.endswith(f" {end}")
    }


def floor_of(regime: str, found: Mapping[str, Plain]) -> dict[int, float]:
    """Return by seed the mean gap of each reference to the others."""
    result = {}
    for seed in REGIMES[regime].seeds:
        items = found[seed_key(regime, seed)]["references"]
        result[seed] = statistics.mean(gap(item, [other for other in items if other is not item]) for item in items)
    return result


def compared(gaps: Mapping[int, float], reference: Mapping[int, float], floor: float) -> str:
    """Return a difference with its paired 95 % interval, bold if it can be told from 0."""
    mean, interval = difference(gaps, reference)
    assert mean is not None
    assert interval is not None
    text = f"{mean:+.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"**{text}**" if told_apart(gaps, reference, floor) else text


def told_apart(gaps: Mapping[int, float], reference: Mapping[int, float], floor: float) -> bool:
    """Return whether a difference is outside the floor, with a paired 95 % interval that does not contain 0."""
    mean, interval = difference(gaps, reference)
    return mean is not None and interval is not None and abs(mean) > floor and interval[0] * interval[1] > 0


def half_width(gaps: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Return half the length of a difference's paired 95 % interval."""
    interval = difference(gaps, reference)[1]
    assert interval is not None
    return (interval[1] - interval[0]) / 2


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def edges(row: Row, rates: Sequence[float]) -> str:
    """Return at how many seeds the tuned rate is the lowest or the highest of the grid."""
    chosen = list(row.rates.values())
    counts = {"low": chosen.count(rates[0]), "high": chosen.count(rates[-1])}
    return ", ".join(f"{count} {edge}" for edge, count in counts.items() if count) or "–"


def control_of(kind: str, kinds: Sequence[str]) -> str | None:
    """Return the mask that a mask is compared with: its layer-matched control, or SalUn's mask."""
    if f"{kind}-layers" in kinds:
        return f"{kind}-layers"
    return None if kind.endswith("-layers") or kind == kinds[0] else kinds[0]


def table(part: Part, found: Mapping[str, Plain]) -> str | None:
    """Return the table of a part as Markdown; None if it is incomplete."""
    rows = rows_of(part, found)
    if rows is None:
        return None
    by_seed = floor_of(part.regime, found)
    floor = statistics.mean(by_seed.values())
    pairs = any(kind.endswith("-layers") for kind in part.kinds)
    beside = "its control" if pairs else "SalUn's"
    titles = ["mask", "energy, %", "passes", *(f"gap at {rate:g}" for rate in part.rates)]
    titles += ["RA / TA / MIA at equal UA", "gap at equal UA", f"minus {beside}"]
    titles += ["gap at the tuned rate", f"minus {beside}", "edge picks"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    lines.append(_fixed_row("model before", part, found, "before"))
    lines.append(_fixed_row("Retrain against Retrain", part, found, "references", by_seed))
    widths: dict[str, list[float]] = {"at equal UA": [], "at the tuned rate": []}
    for kind, row in rows.items():
        other = control_of(kind, part.kinds)
        other = other if other in rows else None
        at_ua = row.at_equal_ua
        means = [100 * statistics.mean(item[name] for item in row.matched.values()) for name in METRICS[1:]]
        cells = [KINDS[kind][0], f"{100 * row.energy:.0f}", f"{row.passes:,.0f}"]
        for rate in part.rates:
            mean = f"{statistics.mean(row.equal[rate].values()):.2f}"
            apart_here = other is not None and told_apart(row.equal[rate], rows[other].equal[rate], floor)
            cells.append(f"**{mean}**" if apart_here else mean)
        cells += [" / ".join(f"{value:.1f}" for value in means)]
        cells += [spread(list(at_ua.values())) + ("*" if row.nearest else "")]
        cells += ["–" if other is None else compared(at_ua, rows[other].at_equal_ua, floor)]
        cells += [spread(list(row.tuned.values()))]
        cells += ["–" if other is None else compared(row.tuned, rows[other].tuned, floor)]
        cells += [edges(row, part.rates)]
        lines.append("| " + " | ".join(cells) + " |")
        if other is not None:
            widths["at equal UA"].append(half_width(at_ua, rows[other].at_equal_ua))
            widths["at the tuned rate"].append(half_width(row.tuned, rows[other].tuned))
    far = [
        f"{len(row.nearest)} of {len(by_seed)} seeds ({KINDS[kind][0]})" for kind, row in rows.items() if row.nearest
    ]
    if far:
        reason = "The nearest rate counts, because no rate brackets the UA of the retrained models"
        lines += ["", f"\\* {reason}: {', '.join(far)}."]
    if len(rows) > 1:
        ranges = [f"{_between(values)} points {where}" for where, values in widths.items()]
        lines += ["", f"Half-widths of the intervals: {', '.join(ranges)}."]
    return "\n".join(lines)


def _between(values: Sequence[float]) -> str:
    """Return the smallest and the largest value, or the only one."""
    return " to ".join(f"{value:.2f}" for value in sorted({min(values), max(values)}))


def _fixed_row(
    name: str, part: Part, found: Mapping[str, Plain], which: str, gaps: Mapping[int, float] | None = None
) -> str:
    """Return the row of the original, or of the references, which have no rate."""
    models: list[Plain] = []
    own: list[float] = []
    for seed in REGIMES[part.regime].seeds:
        known = found[seed_key(part.regime, seed)]
        models += known["references"] if which == "references" else [known["before"]]
        own.append(gaps[seed] if gaps else gap(known["before"], known["references"]))
    ua, *means = (100 * statistics.mean(item[metric] for item in models) for metric in METRICS)
    shown = " / ".join(f"{value:.1f}" for value in means)
    cells = [name, "–", "–", *("–" for _ in part.rates), f"{shown} (UA {ua:.1f})", spread(own), *["–"] * 4]
    return "| " + " | ".join(cells) + " |"


def tables(found: Mapping[str, Plain], parts: Sequence[Part] = PARTS) -> str:
    """Return the tables of all complete masks, and the names of the masks that were not measured."""
    shown, missing = [], []
    for part in parts:
        rows, heading = rows_of(part, found) or {}, part.title + (", candidates" if part.name == "candidates" else "")
        if rows:
            shown.append(f"### {heading[0].upper()}{heading[1:]}\n\n{table(part, found)}")
        absent = [KINDS[kind][0] for kind in part.kinds if kind not in rows]
        if absent:
            missing.append(f"- {heading}: " + ("all masks" if not rows else "; ".join(absent)))
    if missing:
        shown.append("### Not measured\n\n" + "\n".join(missing))
    return "\n\n".join(shown)


def picture(found: Mapping[str, Plain]) -> str:
    """Draw average gap against UA for each complete regime: one line per mask, one dot per rate, means of the seeds."""
    colours = ("after", "retain", "forget", "test", "reference", "before", "ink")
    parts = {part: rows for part in PARTS if part.name == "half" and (rows := rows_of(part, found))}

    def paint(figure: Any) -> str:  # noqa: ANN401 - matplotlib is imported where it is needed
        axes = figure.subplots(1, max(1, len(parts)), squeeze=False)[0]
        for axis, (part, rows) in zip(axes, parts.items(), strict=False):
            seeds = REGIMES[part.regime].seeds
            known = [found[seed_key(part.regime, seed)] for seed in seeds]
            for kind, colour in zip(MAIN, colours, strict=True):
                if kind not in rows:
                    continue
                items = {rate: [found[cell_key(part, kind, rate, seed)] for seed in seeds] for rate in part.rates}
                across = [100 * statistics.mean(item["UA"] for item in row) for row in items.values()]
                up = [
                    statistics.mean(gap(item, one["references"]) for item, one in zip(row, known, strict=True))
                    for row in items.values()
                ]
                axis.plot(across, up, "o-", color=COLOURS[colour], markersize=4, linewidth=1, label=KINDS[kind][0])
            wanted = [100 * item["UA"] for one in known for item in one["references"]]
            axis.axvline(statistics.mean(wanted), color=COLOURS["muted"], linewidth=0.8, linestyle="--")
            floor = statistics.mean(floor_of(part.regime, found).values())
            axis.axhspan(0, floor, color=COLOURS["grid"], alpha=0.6)
            axis.set_title(REGIMES[part.regime].title)
            axis.set_xlabel("UA after unlearning, %")
            axis.set_ylim(bottom=0)
        axes[0].set_ylabel("average gap to Retrain, points")
        axes[0].legend(fontsize=6.5)
        return "Average gap against UA for each mask and rate. The dashed line is the retrained models' UA."

    drawn = draw("saliency", 3.4 * max(1, len(parts)), 3.6, paint)
    return standalone(drawn, digest(found))


def digest(found: Mapping[str, Plain]) -> str:
    """Return the digest that connects the picture with the results."""
    return sha256_bytes(json.dumps(found, sort_keys=True).encode())


def filled(page: str, found: Mapping[str, Plain]) -> str:
    """Return the page with the tables between their markers."""
    pattern = re.compile(r"(<!-- masks -->\n).*?(\n<!-- /masks -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE} has no marker masks")
    return pattern.sub(lambda match: f"{match[1]}{tables(found)}{match[2]}", page)


def in_step() -> bool:
    """Return whether page and picture are those of the results."""
    found = json.loads(RESULTS.read_text())["cells"]
    return filled(PAGE.read_text(), found) == PAGE.read_text() and digest(found) in FIGURE.read_text()


def main() -> None:
    """Measure, and write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10/ and faces/")
    parser.add_argument("--out", type=Path, default=Path(".salun/masks"), help="models and cells")
    parser.add_argument("--parts", nargs="*", help="such as cifar10-random10:half; default: all")
    parser.add_argument("--write", action="store_true", help="write results, page and picture")
    parser.add_argument("--plan", action="store_true", help="show the parts and how many of their cells are missing")
    parser.add_argument("--check", action="store_true", help="fail if the page is out of step with the results")
    given = parser.parse_args()
    if given.check:
        sys.exit(None if in_step() else "docs/research/saliency.md is out of step: run lab/studies/masks.py --write")
    torch.set_num_threads(1)
    store = Store(given.out / "cells.json")
    parts = [part for part in PARTS if not given.parts or f"{part.regime}:{part.name}" in given.parts]
    if given.plan:
        for part in parts:
            keys = [
                cell_key(part, kind, rate, seed)
                for kind in part.kinds
                for rate in part.rates
                for seed in REGIMES[part.regime].seeds
            ]
            print(f"{part.regime}:{part.name}: {sum(key not in store.found for key in keys)} of {len(keys)} missing")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.write:
        measure(parts, store, given.out, given.data)
    found = store.found
    print(tables(found))
    if given.write:
        document = {"machine": machine(), "torch": torch.__version__, "cells": found}
        RESULTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        FIGURE.write_text(picture(found), encoding="utf-8")
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
