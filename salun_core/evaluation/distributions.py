"""Histograms of losses and confidences, accuracies by class and the confusion matrix, for the report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from salun_core.evaluation.evidence import ClassAccuracy, Distribution, Series
from salun_core.evaluation.outputs import Outputs

BINS = 40
LOSS_RANGE = (1e-5, 20.0)

ByModel = Mapping[str, Mapping[str, Outputs]]
"""Model (before, after, reference) -> split (forget, retain, test) -> outputs."""


def distributions(outputs: ByModel) -> dict[str, Distribution]:
    """Return histograms of the loss (nats, geometric bins, the rest counted at the ends) and of the confidence."""
    losses = {model: {split: item.losses for split, item in splits.items()} for model, splits in outputs.items()}
    confidences = {
        model: {split: item.confidences for split, item in splits.items()} for model, splits in outputs.items()
    }
    return {
        "loss": _histograms(losses, np.geomspace(*LOSS_RANGE, BINS + 1)),
        "confidence": _histograms(confidences, np.linspace(0, 1, BINS + 1)),
    }


def _histograms(values: Mapping[str, Mapping[str, np.ndarray]], edges: np.ndarray) -> Distribution:
    splits = {}
    for split in values["before"]:
        counts = {model: _counts(by_split[split], edges) for model, by_split in values.items()}
        splits[split] = Series(before=counts["before"], after=counts["after"], reference=counts.get("reference"))
    return Distribution(edges=edges.tolist(), splits=splits)


def _counts(values: np.ndarray, edges: np.ndarray) -> list[int]:
    finite = values[np.isfinite(values)]
    counts: list[int] = np.histogram(np.clip(finite, edges[0], edges[-1]), bins=edges)[0].tolist()
    return counts


def accuracy_by_class(before: Outputs, after: Outputs, classes: list[str]) -> list[ClassAccuracy]:
    """Return the accuracy of each class on the test split, before and after, as ratios."""
    rows = []
    for class_id, name in enumerate(classes):
        chosen = before.labels == class_id
        n = int(chosen.sum())
        values = [float(item.correct[chosen].mean()) if n else None for item in (before, after)]
        rows.append(ClassAccuracy(class_id=class_id, name=name, before=values[0], after=values[1], n=n))
    return rows


def confusion(outputs: Outputs, num_classes: int) -> list[list[int]]:
    """Return the confusion matrix, rows true and columns predicted, as counts."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (outputs.labels, outputs.predictions), 1)
    rows: list[list[int]] = matrix.tolist()
    return rows
