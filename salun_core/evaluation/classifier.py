"""Evaluation of a classifier before and after unlearning, optionally against a retrained reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from torch import nn

from salun_core.data.images import ImageSet
from salun_core.errors import DataError
from salun_core.evaluation.evidence import (
    ClassAccuracy,
    Distribution,
    Evidence,
    Forgotten,
    Measured,
    Metric,
    RunFacts,
    Series,
)
from salun_core.evaluation.integrity import compare_weights
from salun_core.evaluation.membership import attack_roc, confidence_attack, entropy_attack
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import auc_interval, average_gap, wilson_interval
from salun_core.saliency import SaliencyMask

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


@dataclass(frozen=True)
class Splits:
    """The images that a classifier is evaluated on, all with true labels.

    Args:
        forget: D_f.
        retain: D_r.
        test: unseen data; classes that are forgotten as a whole are left out of TA.
    """

    forget: ImageSet
    retain: ImageSet
    test: ImageSet


def evaluate_classifier(
    before: nn.Module,
    after: nn.Module,
    splits: Splits,
    measured: Measured,
    forgotten: Forgotten,
    reference: nn.Module | None = None,
    mask: SaliencyMask | None = None,
    classes: list[str] | None = None,
    run: RunFacts | None = None,
) -> Evidence:
    """Measure UA, RA, TA, MIA and what the report shows.

    UA = 1 - accuracy on D_f; RA = accuracy on D_r; TA = accuracy on the test split; MIA = share of D_f that the
    confidence attack calls non-member; all as ratios with n and a 95 % interval.

    Args:
        before: the original model.
        after: the unlearned model.
        splits: images on the models' device.
        measured: digests of everything that is measured here.
        forgotten: what was asked for.
        reference: a model retrained without D_f.
        mask: weights outside it are compared bit by bit.
        classes: class names by id.
        run: how `after` was made.

    Returns:
        The evidence.

    Raises:
        DataError: a split is empty.
        ModelError: the models or the mask do not fit each other.
    """
    for name, images in (("forget", splits.forget), ("retain", splits.retain), ("test", splits.test)):
        if len(images) == 0:
            raise DataError(
                f"{name} split is empty", "nothing can be measured on it", "check the data and the forget target"
            )
    models = {"before": before, "after": after} | ({"reference": reference} if reference is not None else {})
    outputs = {name: _all_outputs(model, splits, forgotten.classes) for name, model in models.items()}
    names = classes or [str(index) for index in range(outputs["after"]["test"].probabilities.shape[1])]
    full_test = {name: outputs[name]["full_test"] for name in outputs}
    shown = {name: {split: item for split, item in by.items() if split != "full_test"} for name, by in outputs.items()}
    attacked = {name: _attacked(by["forget"], forgotten.classes) for name, by in shown.items()}
    roc = {name: curve for name, by in shown.items() if (curve := attack_roc(attacked[name], by["test"])) is not None}
    metrics = _metrics(shown) | _by_group({name: by["forget"] for name, by in shown.items()}, forgotten.classes)
    sizes = len(attacked["after"]), len(shown["after"]["test"])
    metrics["attack_auc"] = _auc_metric({name: curve.auc for name, curve in roc.items()}, *sizes)
    # Who knows the model's line puts the value of its last full training here.
    metrics["TA"] = metrics["TA"].model_copy(update={"origin": metrics["TA"].before})
    if reference is not None:
        metrics["gap"] = Metric(before=average_gap(metrics, "before"), after=average_gap(metrics), n=len(splits.forget))
    return Evidence(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=measured,
        forgotten=forgotten,
        integrity=compare_weights(before, after, mask),
        metrics=metrics,
        distributions=distributions(shown),
        per_class=accuracy_by_class(full_test["before"], full_test["after"], names),
        roc=roc,
        confusion=confusion(full_test["after"], len(names)),
        classes=names,
        run=run or RunFacts(),
    )


def _all_outputs(model: nn.Module, splits: Splits, forgotten_classes: list[int]) -> dict[str, Outputs]:
    test = outputs_of(model, splits.test)
    kept = ~np.isin(test.labels, forgotten_classes)
    if not kept.any():
        raise DataError("no test image is left", "all their classes are forgotten", "keep at least one class")
    return {
        "forget": outputs_of(model, splits.forget),
        "retain": outputs_of(model, splits.retain),
        "test": test.where(kept),
        "full_test": test,
    }


def metric_shares(by_split: Mapping[str, Outputs]) -> dict[str, np.ndarray]:
    """Return each metric as one bool a sample; its mean is the metric.

    Args:
        by_split: outputs of one model on forget, retain and test.

    Returns:
        UA, RA, TA, and where every output is a number MIA and MIA_entropy.
    """
    forget, retain, test = by_split["forget"], by_split["retain"], by_split["test"]
    shares = {"UA": ~forget.correct, "RA": retain.correct, "TA": test.correct}
    finite = all(np.isfinite(item.probabilities).all() for item in (forget, retain, test))
    if finite:
        shares["MIA"] = confidence_attack(retain, test, forget)
        shares["MIA_entropy"] = entropy_attack(retain, test, forget)
    return shares


def _metrics(outputs: ByModel) -> dict[str, Metric]:
    shares = {model: metric_shares(by_split) for model, by_split in outputs.items()}
    names = ("UA", "RA", "TA", "MIA", "MIA_entropy")
    sizes = {name: len(outputs["after"][_SPLIT_OF[name]]) for name in names}
    return {name: _share_metric({model: by.get(name) for model, by in shares.items()}, sizes[name]) for name in names}


def _share_metric(shares: Mapping[str, np.ndarray | None], n: int) -> Metric:
    values = {model: float(share.mean()) if share is not None else None for model, share in shares.items()}
    after = values["after"]
    low, high = wilson_interval(after, n) if after is not None else (None, None)
    return Metric(before=values["before"], after=after, reference=values.get("reference"), n=n, low=low, high=high)


def _by_group(forget: Mapping[str, Outputs], classes: list[int]) -> dict[str, Metric]:
    """UA of classes that are forgotten as a whole, and UA of single samples, each where there are any."""
    whole = np.isin(forget["after"].labels, classes)
    groups = {"UA_class": whole, "UA_samples": ~whole}
    return {
        name: _share_metric({model: ~item.correct[chosen] for model, item in forget.items()}, int(chosen.sum()))
        for name, chosen in groups.items()
        if chosen.any()
    }


def _attacked(forget: Outputs, classes: list[int]) -> Outputs:
    """The single samples: a class that is gone differs from unseen data of other classes in any case."""
    single = ~np.isin(forget.labels, classes)
    return forget.where(single) if single.any() else forget


def _auc_metric(areas: Mapping[str, float], n: int, test: int) -> Metric:
    low, high = auc_interval(areas["after"], n, test) if "after" in areas else (None, None)
    return Metric(
        before=areas.get("before"), after=areas.get("after"), reference=areas.get("reference"), n=n, low=low, high=high
    )


_SPLIT_OF = {"UA": "forget", "RA": "retain", "TA": "test", "MIA": "forget", "MIA_entropy": "forget"}
