"""Metrics with confidence intervals, and two-sample statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from salun_core.evaluation.evidence import Metric

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: 95 % of it lie within ± this."""


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of n independent samples.

    Unlike the normal approximation p ± z sqrt(p (1 - p) / n), it has a width at shares of 0 and 1, which are common
    here, and it stays within [0, 1].

    Args:
        share: from 0 to 1.
        n: at least 1.

    Returns:
        (low, high), within [0, 1].

    Source:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927: the two solutions p
        of |share - p| = z sqrt(p (1 - p) / n).
    """
    scale = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding may leave [0, 1] at shares of 0 and 1


def auc_interval(auc: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95 % interval of an area under the ROC curve.

    Args:
        auc: from 0 to 1.
        positives: number of positive samples, at least 1.
        negatives: number of negative samples, at least 1.

    Returns:
        (low, high), within [0, 1]: the normal interval, cut, because it can leave [0, 1] near its ends.

    Source:
        Hanley & McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982: the standard error with
        Q1 = A / (2 - A) and Q2 = 2 A^2 / (1 + A), exact for exponentially distributed scores.
    """
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    half = Z95 * math.sqrt(
        max(0.0, variance) / (positives * negatives)
    )  # below 0 by rounding only, at areas of 0 and 1
    return max(0.0, auc - half), min(1.0, auc + half)


def share_metric(shares: Mapping[str, float | None], n: int) -> Metric:
    """Return a metric of shares of n independent samples, with Wilson's interval.

    Args:
        shares: by model: before, after, reference; a missing one is null.
        n: number of samples.
    """
    after = shares.get("after")
    return Metric.of(shares, n, (None, None) if after is None else wilson_interval(after, n))


def area_metric(areas: Mapping[str, float], positives: int, negatives: int) -> Metric:
    """Return a metric of areas under the ROC curve, with Hanley and McNeil's interval; n counts the positives.

    Args:
        areas: by model: before, after, reference; a missing one is null.
        positives: number of positive samples.
        negatives: number of negative samples.
    """
    interval = auc_interval(areas["after"], positives, negatives) if "after" in areas else (None, None)
    return Metric.of(areas, positives, interval)


def average_gap(metrics: dict[str, Metric], model: str = "after") -> float | None:
    """Return the paper's average gap: the mean of |UA, RA, TA, MIA - retrained|, as a ratio.

    Args:
        metrics: evidence with a reference.
        model: before or after.

    Returns:
        The gap, or None if a value or the reference is missing.

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
    """Return the area under the ROC curve: the probability that a positive scores higher, a tie counted half.

    Computed from counts of pairs, so that it is exact and does not depend on the order of the samples.

    Args:
        positives: scores, float64 [N], N at least 1.
        negatives: scores, float64 [M], M at least 1.

    Returns:
        From 0 to 1; 1/2 if the score carries no information.

    Source:
        Mann & Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other",
        Annals of Mathematical Statistics 1947.
    """
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left") + np.searchsorted(ordered, positives, side="right")
    return float(below.sum() / 2 / (len(positives) * len(negatives)))
