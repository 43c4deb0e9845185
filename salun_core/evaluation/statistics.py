"""Confidence intervals and two-sample tests."""

from __future__ import annotations

import math

import numpy as np

from salun_core.evaluation.evidence import Metric

_Z95 = 1.959963984540054


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of n independent samples.

    Args:
        share: from 0 to 1.
        n: at least 1.

    Returns:
        (low, high), within [0, 1].

    Source:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    scale = 1 + _Z95**2 / n
    centre = (share + _Z95**2 / (2 * n)) / scale
    half = _Z95 * math.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def auc_interval(auc: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95 % interval of an area under the ROC curve.

    Source:
        Hanley & McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982.
    """
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    half = _Z95 * math.sqrt(max(0.0, variance) / (positives * negatives))
    return max(0.0, auc - half), min(1.0, auc + half)


def average_gap(metrics: dict[str, Metric], model: str = "after") -> float | None:
    """Return the paper's average gap: the mean of |UA, RA, TA, MIA - retrained|, as a ratio.

    Args:
        metrics: evidence with a reference.
        model: before or after.

    Returns:
        The gap, or None where a value or the reference is missing.

    Source:
        Fan et al., "SalUn", ICLR 2024, section 6.1.
    """
    gaps: list[float] = []
    for name in ("UA", "RA", "TA", "MIA"):
        metric = metrics.get(name)
        value: float | None = getattr(metric, model) if metric else None
        if metric is None or value is None or metric.reference is None:
            return None
        gaps.append(abs(value - metric.reference))
    return sum(gaps) / len(gaps)


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest distance of two empirical distribution functions.

    Args:
        first: losses, float64 [N], N at least 1.
        second: losses, float64 [M], M at least 1.

    Returns:
        D from 0 (the same values) to 1 (no overlap).

    Source:
        Smirnov, "Table for Estimating the Goodness of Fit of Empirical Distributions", Annals of Mathematical
        Statistics 1948.
    """
    places = np.concatenate([first, second])
    below = [np.searchsorted(np.sort(item), places, side="right") / len(item) for item in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def rank_area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the probability that a positive scores higher than a negative, a tie counted half: the area of the ROC.

    Args:
        positives: scores, float64 [N], N at least 1.
        negatives: scores, float64 [M], M at least 1.

    Returns:
        From 0 to 1; 1/2 when the score tells nothing.

    Source:
        Mann & Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other",
        Annals of Mathematical Statistics 1947.
    """
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left") + np.searchsorted(ordered, positives, side="right")
    return float(below.sum() / 2 / (len(positives) * len(negatives)))
