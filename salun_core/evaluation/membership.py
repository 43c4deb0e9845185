"""Membership inference: does the model still treat the forget set as data it was trained on?

`confidence_attack` is the paper's MIA; `entropy_attack` is Song & Mittal's. Both are population attacks: one rule for
all samples, or for all of a class. A low value does not prove that a sample was forgotten.

Every comparison of D_f with unseen data is matched by class: unseen samples are weighted to the class histogram of D_f.
Classes differ in how hard they are, so that without weights even a model that never saw D_f tells a forget set that is
no random draw from unseen data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from salun_core.evaluation.evidence import Curve, Metric
from salun_core.evaluation.outputs import TINY, Outputs
from salun_core.evaluation.statistics import (
    area_change,
    area_metric,
    effective_size,
    kuiper,
    kuiper_interval,
    mean_interval,
    rank_area,
    share_metric,
)


class Matching(NamedTuple):
    """The part of D_f that can be compared with unseen data, and the weights of the unseen samples.

    Args:
        chosen: bool [N], the samples of D_f whose class has unseen samples; all if no class has.
        weights: float64 [M], of the unseen samples, with mean 1. Classes that are not in D_f have weight 0; all weights
            are 1 if no class is in both.
    """

    chosen: np.ndarray
    weights: np.ndarray


def match_classes(forget: np.ndarray, unseen: np.ndarray) -> Matching:
    """Weight unseen samples to the class histogram of D_f; both arguments are labels, int64 [N] and [M]."""
    chosen = np.isin(forget, unseen)
    if not chosen.any():
        return Matching(np.ones(len(forget), dtype=bool), np.ones(len(unseen)))
    size = int(max(forget.max(), unseen.max())) + 1
    wanted = np.bincount(forget[chosen], minlength=size) / chosen.sum()
    found = np.maximum(np.bincount(unseen, minlength=size), 1) / len(unseen)
    return Matching(chosen, np.asarray((wanted / found)[unseen]))


_MOST_POINTS = 2048  # on each side of the support vector classifier, whose cost grows with the square


def confidence_attack(retain: Outputs, test: Outputs, forget: Outputs) -> np.ndarray:
    """Attack by the probability of the true class: bool [len(forget)], true for a non-member.

    The mean of the result is the paper's MIA. An RBF support vector classifier (C = 3, gamma "auto") is fitted on the
    first retain samples (members), as many as there are test samples (non-members). Both sides are weighted to the
    class histogram of D_f (`match_classes`), which the paper's code does not do; the weights are near 1 for a random
    forget set. With more than 2,048 samples per side, each side is sorted and divided into 2,048 runs of neighbours,
    and a run becomes one point at its mean, with its weight. Only answers for samples near the decision boundary
    differ: on simulated confidences the MIA changed by less than 0.1 points.

    Source:
        Fan et al., "SalUn", ICLR 2024, appendix C.3; after Song & Mittal, USENIX Security 2021.
    """
    from sklearn.svm import SVC

    size = min(len(retain), len(test))
    sides = [
        _weighted_runs(side.confidences[:size], match_classes(forget.labels, side.labels[:size]).weights)
        for side in (retain, test)
    ]
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(
        np.concatenate([values for values, _ in sides])[:, None],
        np.repeat([1, 0], [len(values) for values, _ in sides]),
        np.concatenate([weights for _, weights in sides]),
    )
    return np.asarray(attack.predict(forget.confidences[:, None]) == 0)


def _weighted_runs(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 2,048 points and their weights: runs of neighbours whose sizes differ by at most one."""
    values, weights = values[weights > 0], weights[weights > 0]
    if len(values) <= _MOST_POINTS:
        return values, weights
    order = np.argsort(values, kind="stable")
    edges = np.arange(_MOST_POINTS + 1) * len(values) // _MOST_POINTS
    sums = np.add.reduceat(weights[order], edges[:-1])
    return np.add.reduceat((values * weights)[order], edges[:-1]) / sums, sums


def modified_entropy(outputs: Outputs) -> np.ndarray:
    """Return Song & Mittal's modified entropy, in nats: low for a confident right answer, high for a wrong one.

        Mentr(p, y) = -(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i)

    Source:
        Song & Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021,
        equation (8).
    """
    p = outputs.probabilities
    true = outputs.confidences
    others = p * np.log(np.clip(1 - p, TINY, 1))
    others[np.arange(len(outputs)), outputs.labels] = 0.0
    return np.asarray(-(1 - true) * np.log(np.clip(true, TINY, 1)) - others.sum(axis=1))


def entropy_attack(retain: Outputs, test: Outputs, forget: Outputs) -> np.ndarray:
    """Attack by modified entropy with one threshold per class: bool [len(forget)], true for a non-member.

    A threshold separates retain (members, low) from test (non-members, high) with the best balanced accuracy; the
    lowest one on a tie. A class without members or non-members gets the threshold of all samples.

    Source:
        Song & Mittal, USENIX Security 2021, section 4.2.
    """
    members, others, asked = (modified_entropy(item) for item in (retain, test, forget))
    thresholds = np.empty(len(forget))
    for label in np.unique(forget.labels):
        sides = members[retain.labels == label], others[test.labels == label]
        if not all(len(side) for side in sides):
            sides = members, others
        thresholds[forget.labels == label] = _threshold(*sides)
    return np.asarray(asked > thresholds)


def _threshold(members: np.ndarray, others: np.ndarray) -> float:
    members, others = np.sort(members), np.sort(others)
    candidates = np.unique(np.concatenate([members, others]))
    caught = np.searchsorted(members, candidates, side="right")
    kept = len(others) - np.searchsorted(others, candidates, side="right")
    right = caught * len(others) + kept * len(members)  # balanced accuracy in whole numbers, so that ties are ties
    return float(candidates[np.argmax(right)])


def matched_area(forget: Outputs, unseen: Outputs) -> float:
    """Return the area of telling D_f from unseen samples of the same classes by a high margin; 1/2 is guessing."""
    chosen, weights = match_classes(forget.labels, unseen.labels)
    return rank_area(forget.margins[chosen], unseen.margins, weights)


def forgetting_metrics(forget: Mapping[str, Outputs], unseen: Mapping[str, Outputs]) -> dict[str, Metric]:
    """Measure what a model still knows of D_f that it does not know of unseen data, and what unlearning changed.

    All are over unseen data of the classes of D_f, in its mixture, and null if a margin is not finite, except
    UA_unseen.

    attack_auc: the area of telling D_f by a high margin; 1/2 is guessing.

    effect: by how much this area fell from before to after, with the interval of the paired difference. Areas are of
    ranks, so that a change that treats D_f like unseen data (temperature, noise) has no effect.

    change: mean absolute change of the margins on D_f, in units of the typical margin of unseen data of the same model,
    so that scaling all logits is no change. It is 1e-6 for float noise, and has no direction.

    attack_shape: Kuiper's distance of the margins on D_f and on unseen data; 0 if they are distributed alike. It shows
    what the area leaves open: some samples marked, and others as familiar as before.

    UA_unseen: share of unseen data that is misclassified.
    """
    chosen, weights = match_classes(forget["after"].labels, unseen["after"].labels)
    size, count = effective_size(weights), int(chosen.sum())
    wrong = {name: float(np.average(~item.correct, weights=weights)) for name, item in unseen.items()}
    metrics = {"UA_unseen": share_metric(wrong, int(size))}
    scores = {
        name: (item.margins[chosen], unseen[name].margins)
        for name, item in forget.items()
        if np.isfinite(item.margins).all() and np.isfinite(unseen[name].margins).all()
    }
    areas = {name: rank_area(*pair, weights) for name, pair in scores.items()}
    metrics["attack_auc"] = area_metric(areas, count, size)
    shapes = {name: kuiper(*pair, weights) for name, pair in scores.items()}
    ends = kuiper_interval(shapes["after"], count, size) if "after" in shapes else (None, None)
    metrics["attack_shape"] = Metric.of(shapes, count, ends)
    metrics |= {"effect": Metric.of({}, count), "change": Metric.of({}, count)}
    if "before" in scores and "after" in scores:
        fall, interval = area_change(scores["before"], scores["after"], weights)
        metrics["effect"] = Metric.of({"before": 0.0, "after": fall}, count, interval)
        typical = {name: float(np.average(np.abs(pair[1]), weights=weights)) for name, pair in scores.items()}
        if min(typical["before"], typical["after"]) > 0:
            change = np.abs(scores["before"][0] / typical["before"] - scores["after"][0] / typical["after"])
            of_mean = mean_interval(change) if count > 1 else (None, None)
            metrics["change"] = Metric.of({"before": 0.0, "after": float(change.mean())}, count, of_mean)
    return metrics


def attack_roc(forget: Outputs, test: Outputs, points: int = 200) -> Curve | None:
    """Return the ROC of telling forget samples (positive) from test samples by a high margin, matched by class.

    Forget samples of a class without test samples are left out. None if a margin is not finite or a set is empty.
    """
    from sklearn.metrics import roc_curve

    if not len(forget) or not len(test) or not np.isfinite([*forget.margins, *test.margins]).all():
        return None
    chosen, weights = match_classes(forget.labels, test.labels)
    asked = forget.margins[chosen]
    truth = np.concatenate([np.ones(len(asked)), np.zeros(len(test))])
    scores = np.concatenate([asked, test.margins])
    fpr, tpr, _ = roc_curve(truth, scores, sample_weight=np.concatenate([np.ones(len(asked)), weights]))
    keep = np.unique(np.linspace(0, len(fpr) - 1, min(points, len(fpr))).astype(int))
    return Curve(fpr=fpr[keep].tolist(), tpr=tpr[keep].tolist(), auc=rank_area(asked, test.margins, weights))
