"""Membership inference: does the model still treat the forget set as data it was trained on?

`confidence_attack` is the paper's MIA; `entropy_attack` is Song & Mittal's. Both are population attacks: one rule for
all samples. A low value does not prove that a sample was forgotten.
"""

from __future__ import annotations

import numpy as np

from salun_core.evaluation.evidence import Curve
from salun_core.evaluation.outputs import TINY, Outputs

_MOST_POINTS = 2048  # on each side of the support vector classifier, whose cost grows with the square


def confidence_attack(retain: Outputs, test: Outputs, forget: Outputs) -> np.ndarray:
    """Attack by the probability of the true class: which forget samples are classified as non-members?

    An RBF support vector classifier (C = 3, gamma "auto") is fitted on the first retain samples (members), as many as
    there are test samples (non-members). With more than 2,048 samples per side, each side is sorted and divided into
    2,048 runs of neighbours, and a run becomes one point at its mean, weighted by its count. This is the same problem
    with each confidence moved to the mean of its run. Only answers for samples near the decision boundary differ: on
    simulated confidences the MIA changed by less than 0.1 points.

    Args:
        retain: D_r, at least one sample.
        test: unseen data.
        forget: D_f.

    Returns:
        bool [len(forget)], true for a non-member. Its mean is the paper's MIA.

    Source:
        Fan et al., "SalUn", ICLR 2024, appendix C.3; after Song & Mittal, USENIX Security 2021.
    """
    from sklearn.svm import SVC

    size = min(len(retain), len(test))
    members, member_weights = _weighted_runs(retain.confidences[:size])
    others, other_weights = _weighted_runs(test.confidences[:size])
    truth = np.repeat([1, 0], [len(members), len(others)])
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(
        np.concatenate([members, others])[:, None], truth, np.concatenate([member_weights, other_weights])
    )
    return np.asarray(attack.predict(forget.confidences[:, None]) == 0)


def _weighted_runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 2,048 points and their weights: runs of neighbours whose sizes differ by at most one."""
    if len(values) <= _MOST_POINTS:
        return values, np.ones(len(values))
    edges = np.arange(_MOST_POINTS + 1) * len(values) // _MOST_POINTS
    counts = np.diff(edges).astype(np.float64)
    return np.add.reduceat(np.sort(values), edges[:-1]) / counts, counts


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
    """Attack by modified entropy with one threshold: which forget samples are classified as non-members?

    The threshold separates retain (members, low) from test (non-members, high) with the best balanced accuracy; the
    lowest one on a tie.

    Returns:
        bool [len(forget)], true for a non-member.
    """
    members, others = np.sort(modified_entropy(retain)), np.sort(modified_entropy(test))
    candidates = np.unique(np.concatenate([members, others]))
    caught = np.searchsorted(members, candidates, side="right")
    kept = len(others) - np.searchsorted(others, candidates, side="right")
    right = caught * len(others) + kept * len(members)  # balanced accuracy in whole numbers, so that ties are ties
    threshold = candidates[np.argmax(right)]
    return np.asarray(modified_entropy(forget) > threshold)


def attack_roc(forget: Outputs, test: Outputs, points: int = 200) -> Curve | None:
    """Return the ROC of telling forget samples (positive) from test samples by a low loss.

    Args:
        forget: D_f.
        test: unseen data.
        points: maximum number of points of the curve that are kept.

    Returns:
        The curve with its area; 1/2 means that the two cannot be told apart. None if a loss is not finite or a set is
        empty.
    """
    from sklearn.metrics import auc, roc_curve

    scores = np.concatenate([-forget.losses, -test.losses])
    if not len(forget) or not len(test) or not np.isfinite(scores).all():
        return None
    truth = np.concatenate([np.ones(len(forget)), np.zeros(len(test))])
    fpr, tpr, _ = roc_curve(truth, scores)
    keep = np.unique(np.linspace(0, len(fpr) - 1, min(points, len(fpr))).astype(int))
    return Curve(fpr=fpr[keep].tolist(), tpr=tpr[keep].tolist(), auc=float(auc(fpr, tpr)))
