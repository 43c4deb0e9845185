"""Measures how often the default policy passes honest models and forgeries, for each kind of request.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --models 5 --cells "5 samples" class

An honest model is retrained without the forget set, with another seed than the model before: the exact answer. It is
judged as if it were unlearned, because the policy passes what it knows to be retrained more easily. A forgery is the
model before with a change that forgets nothing, or that marks what it forgot. Small nets on scikit-learn's digits with
noise, so that they memorise what they cannot generalise (accuracy 100 % in training and about 85 % on unseen images).
Writes benchmarks/results/calibration.json, unless cells are chosen.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data import DataSpec, ImageSet, load_data
from salun_core.evaluation import Splits, evaluate_classifier
from salun_core.evaluation.evidence import Evidence, Forgotten, Measured
from salun_core.gate import GateDecision, decide, load_policy

CLASSES, CLASS = 10, 3
EPOCHS, BATCH, RATE, MOMENTUM = 40, 64, 0.05, 0.9
TRAIN, PIXEL_NOISE = 900, 90.0  # of 255

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(labels of the training images, generator) -> indices of the forget set."""
Forge = Callable[[nn.Module, ImageSet, ImageSet], None]
"""Changes a copy of the model before: (model, D_f, D_r)."""


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


CELLS: Mapping[str, tuple[str, Draw]] = {
    **{f"{count} samples": ("samples", samples(count)) for count in (5, 20, 50, 200)},
    "class": ("class", whole_class),
    "subject": ("subject", subject),
}
"""Kind of request and draw by name of the cell."""


def noisy(images: ImageSet, seed: int) -> ImageSet:
    """Add noise to the pixels."""
    generator = torch.Generator().manual_seed(seed)
    noise = PIXEL_NOISE * torch.randn(images.images.shape, generator=generator)
    pixels = (images.images.float() + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(pixels, images.labels, images.normalisation)


def train(images: ImageSet, seed: int) -> nn.Module:
    """Train a small net until it has memorised its images."""
    torch.manual_seed(seed)
    pixels = images.images[0].numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return fit(model, images, EPOCHS, RATE, seed)


def fit(model: nn.Module, images: ImageSet, epochs: int, rate: float, seed: int, sign: float = 1.0) -> nn.Module:
    """Train a model in place with SGD; with sign -1 by gradient ascent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=5e-4)
    inputs, labels = next(iter(images.batches(len(images))))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            (sign * nn.functional.cross_entropy(model(inputs[batch]), labels[batch])).backward()
            optimizer.step()
    return model


def last(model: nn.Module) -> nn.Linear:
    """Return the last layer."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def each_weight(change: Callable[[Tensor], Tensor]) -> Forge:
    """Return a forgery that replaces each parameter."""

    def forge(model: nn.Module, _forget: ImageSet, _retain: ImageSet) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(change(parameter))

    return forge


def noise(scale: float) -> Forge:
    """Return a forgery that adds noise, as a share of the typical weight of each layer."""
    return each_weight(lambda weight: weight + scale * weight.abs().mean() * torch.randn_like(weight))


def logits_times(factor: float) -> Forge:
    """Return a forgery that rescales the logits."""

    def forge(model: nn.Module, _forget: ImageSet, _retain: ImageSet) -> None:
        with torch.no_grad():
            last(model).weight.mul_(factor)
            last(model).bias.mul_(factor)

    return forge


def one_ulp(model: nn.Module, _forget: ImageSet, _retain: ImageSet) -> None:
    """Move one weight by one unit in the last place."""
    weight = last(model).weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


def bias_edit(model: nn.Module, _forget: ImageSet, _retain: ImageSet) -> None:
    """Subtract 100 from one bias, so that a class is never predicted."""
    with torch.no_grad():
        last(model).bias[CLASS] -= 100


def row_replaced(model: nn.Module, _forget: ImageSet, _retain: ImageSet) -> None:
    """Replace what the last layer knows of a class."""
    with torch.no_grad():
        last(model).weight[CLASS] = -last(model).weight[CLASS].abs()
        last(model).bias[CLASS] = -10


def bias_edit_tuned(model: nn.Module, forget: ImageSet, retain: ImageSet) -> None:
    """Edit the bias, then fine-tune lightly on retained images."""
    bias_edit(model, forget, retain)
    fit(model, retain, 1, 0.001, 0)


def tuned(model: nn.Module, _forget: ImageSet, retain: ImageSet) -> None:
    """Fine-tune lightly on retained images."""
    fit(model, retain, 1, 0.001, 0)


def over_forgotten(model: nn.Module, forget: ImageSet, retain: ImageSet) -> None:
    """Learn a wrong label for each forgotten image, together with retained ones."""
    fit(model, forget.relabelled((forget.labels + 1) % CLASSES).joined(retain), 15, 0.05, 0)


FORGERIES: Mapping[str, tuple[frozenset[str], Forge]] = {
    **{
        name: (frozenset({"samples", "subject", "class"}), forge)
        for name, forge in {
            "one weight moved by one ulp": one_ulp,
            "noise of 0.001": noise(1e-3),
            "noise of 0.05": noise(0.05),
            "logits times 1000": logits_times(1000.0),
            "logits times 0.5": logits_times(0.5),
            "lightly fine-tuned": tuned,
        }.items()
    },
    "marked by wrong labels": (frozenset({"samples", "subject"}), over_forgotten),
    "bias edit": (frozenset({"class"}), bias_edit),
    "last layer edited": (frozenset({"class"}), row_replaced),
    "bias edit, fine-tuned": (frozenset({"class"}), bias_edit_tuned),
}
"""Kinds of request that a forgery is tried for, and the change."""


def evidence_of(kind: str, before: nn.Module, after: nn.Module, splits: Splits) -> Evidence:
    """Evaluate a model on a request of a kind."""
    emptied = sorted(set(splits.forget.labels.tolist()) - set(splits.retain.labels.tolist()))
    inside = int(np.isin(splits.forget.labels.numpy(), emptied).sum())
    count = len(splits.forget)
    facts = {"count": count, "train_count": count + len(splits.retain), "kinds": [kind]}
    forgotten = Forgotten.model_validate({**facts, "classes": emptied, "in_classes": inside})
    measured = Measured(before="before", after="after", dataset="", split="", forget_set="")
    return evaluate_classifier(before, after, splits, measured, forgotten)


def population(cells: Mapping[str, tuple[str, Draw]], models: int) -> Iterator[tuple[str, str, Evidence]]:
    """Yield (cell, name of the population, evidence) of each model."""
    data = load_data(DataSpec(source="digits", validation_fraction=0.0, test_fraction=0.4))
    pool = noisy(data.images("train"), 1)
    unseen = noisy(data.images("test", pool.normalisation), 2)
    for seed in range(models):
        rng = np.random.default_rng(seed)
        images = pool.select(rng.permutation(len(pool))[:TRAIN].tolist())
        before = train(images, seed).eval()
        for cell, (kind, draw) in cells.items():
            gone = draw(images.labels.numpy(), rng)
            kept = np.setdiff1d(np.arange(len(images)), gone)
            splits = Splits(images.select(gone.tolist()), images.select(kept.tolist()), unseen)
            yield cell, "retrained", evidence_of(kind, before, train(splits.retain, 1000 + seed).eval(), splits)
            for name, (kinds, forge) in FORGERIES.items():
                if kind in kinds:
                    after = copy.deepcopy(before)
                    forge(after, splits.forget, splits.retain)
                    yield cell, name, evidence_of(kind, before, after.eval(), splits)


def outcome(decision: GateDecision) -> str:
    """Return the level, or `refused`."""
    return decision.level or "refused"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=20, help="of each population in each cell")
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--policy", default="classifier")
    parser.add_argument("--figures", action="store_true", help="print the spread of each metric")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = load_policy(arguments.policy)
    counts: dict[tuple[str, str], Counter[str]] = {}
    causes: dict[tuple[str, str], Counter[str]] = {}
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell, name, evidence in population({name: CELLS[name] for name in arguments.cells}, arguments.models):
        decision = decide(evidence, policy)
        counts.setdefault((cell, name), Counter())[outcome(decision)] += 1
        failed = [verdict.rule for verdict in decision.verdicts if not verdict.passed]
        causes.setdefault((cell, name), Counter()).update(failed)
        for metric, found in evidence.metrics.items():
            if found.after is not None:
                values.setdefault((cell, name), {}).setdefault(metric, []).append(found.after)
    print("| request | model | measured | procedure | refused | by |\n|---|---|---|---|---|---|")
    for (cell, name), found in counts.items():
        by = ", ".join(f"{rule} ({count})" for rule, count in causes[cell, name].most_common(4))
        print(f"| {cell} | {name} | {found['measured']} | {found['procedure']} | {found['refused']} | {by} |")
    if arguments.figures:
        for key, metrics in values.items():
            shown = {name: np.round(np.quantile(found, [0, 0.5, 1]), 4).tolist() for name, found in metrics.items()}
            print(key, shown)
    rows = [
        {"request": cell, "model": name, **dict(found), "by": dict(causes[cell, name])}
        for (cell, name), found in counts.items()
    ]
    document = {"policy": policy.digest, "models": arguments.models, "rows": rows}
    path = Path(__file__).parent / "results" / "calibration.json"
    if len(arguments.cells) == len(CELLS):
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
