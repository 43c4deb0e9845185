"""Measures what is lost and saved if each epoch trains on a part of the retained images (`retain_fraction`).

    python -m lab.studies.retain_fraction

A ResNet-8 learns scikit-learn's digits and forgets a random tenth, or a class, with SalUn. Each seed has
its own net, forget set and retrained model. The gap is the mean distance of UA, RA, TA and MIA from the retrained
model's. Takes two minutes of one core. Writes lab/results/retain-fraction.json, from which `make generated`
makes the table in docs/research/speed.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun_core.data import DataSpec, ImageSource, load_data
from salun_core.evaluation import Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.methods.classification import unlearn
from salun_core.methods.classification.training import train_classifier
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.tasks.classification.training import training_config

FRACTIONS, SEEDS, CLASS, DENSITY = (1.0, 0.5, 0.25, 0.1, 0.02), (0, 1, 2), 8, 0.5
DATA = {"validation_fraction": 0.15, "test_fraction": 0.2}
RECIPE: dict[str, Any] = {"epochs": 10, "learning_rate": 0.01, "order": "mixed", "device": "cpu"}


def drawn(train: ImageSource, request: str, seed: int) -> torch.Tensor:
    """Return which training images are forgotten, bool [N]."""
    if request == "class":
        return train.labels == CLASS
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(train), dtype=torch.bool)
    chosen[order[: len(train) // 10]] = True
    return chosen


def measured(
    base: nn.Module, reference: nn.Module, splits: Splits, fraction: float, seed: int, classes: list[int]
) -> dict[str, float]:
    """Unlearn with one fraction and return the figures of the result."""
    scores = saliency_scores(base, splits.forget.batches(256), nn.functional.cross_entropy)
    mask = SaliencyMask.from_scores(scores, DENSITY)
    result = unlearn(
        base,
        "salun",
        forget=splits.forget,
        retain=splits.retain,
        mask=mask,
        config={**RECIPE, "retain_fraction": fraction, "seed": seed},
    )
    digests = Measured(
        before=model_digest(base),
        after=model_digest(result.model),
        dataset="",
        split="",
        forget_set="",
        mask=mask.digest,
    )
    size = len(splits.forget)
    forgotten = Forgotten(
        count=size, train_count=size + len(splits.retain), kinds=["class" if classes else "samples"], classes=classes
    )
    metrics = evaluate_classifier(base, result.model, splits, digests, forgotten, reference, mask).metrics
    found = {name: metrics[name].after for name in ("gap", "UA", "RA", "TA")}
    return {name: value for name, value in found.items() if value is not None} | {"passes": result.passes}


def main() -> None:
    """Measure every fraction for every request and seed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    rows: dict[tuple[str, float], list[dict[str, float]]] = {}
    for seed in SEEDS:
        data = load_data(DataSpec(source="digits", split_seed=seed, **DATA))
        train, training = data.images("train"), training_config({"device": "cpu", "seed": seed})
        test = data.images("test", train.normalisation)
        base, _ = train_classifier("resnet8", train, 10, training)
        for request in ("random 10 %", "class"):
            gone = drawn(train, request, seed)
            parts = [train.select(chosen.nonzero().flatten()) for chosen in (gone, ~gone)]
            reference, _ = train_classifier("resnet8", parts[1], 10, training.model_copy(update={"seed": seed + 100}))
            classes = [CLASS] if request == "class" else []
            for fraction in FRACTIONS:
                found = measured(base, reference, Splits(*parts, test), fraction, seed, classes)
                rows.setdefault((request, fraction), []).append(found)
                print(seed, request, fraction, {name: round(value, 4) for name, value in found.items()}, flush=True)
    document = {
        "cpu_s": time.process_time() - started,
        "recipe": {name: value for name, value in RECIPE.items() if name != "device"},
        "rows": [{"request": request, "fraction": value, "figures": found} for (request, value), found in rows.items()],
        "torch": torch.__version__,
    }
    target = Path(__file__).parents[1] / "results" / "retain-fraction.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
