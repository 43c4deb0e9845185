"""Metrics with confidence intervals, and two-sample statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from salun_core.evaluation.evidence import Metric, Share

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: 95 % of it lie within ± this."""

_KUIPER_95 = 1.7473  # solves 2 sum_j (4 j^2 x^2 - 1) exp(-2 j^2 x^2) = 0.05, Kuiper's distribution


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of n independent samples.

    For correlated samples n is the effective number. Unlike the normal approximation p ± z sqrt(p (1 - p) / n), it has
    a width at shares of 0 and 1, which are common here, and it stays within [0, 1].

    Source:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927: the two solutions p
        of |share - p| = z sqrt(p (1 - p) / n).
    """
    scale = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding may leave [0, 1] at shares of 0 and 1


def share_power(share: float, n: int, bound: float, *, above: bool) -> float:
    """Return the probability that Wilson's interval of n samples of a true share lies above, or below, a bound."""
    from scipy.stats import binom

    if not above:
        share, bound = 1 - share, 1 - bound
    ends = (wilson_interval(count / n, n)[0] for count in range(n + 1))
    least = next((count for count, low in enumerate(ends) if low >= bound), n + 1)
    return float(binom.sf(least - 1, n, share))


def auc_interval(auc: float, positives: float, negatives: float) -> tuple[float, float]:
    """Return the 95 % interval of an area under the ROC curve; sample numbers are effective ones if they are weighted.

    The normal interval around the observed area is wrong for few samples: with one positive sample its area is uniform
    on [0, 1] for a score without information, and an area below 0.15 would be called a finding. This interval holds all
    areas under which the observed one is not among the 2.5 % most extreme on either side (as Clopper and Pearson's does
    for shares). The distribution of the observed area is a Beta distribution with the true area as mean and with Hanley
    and McNeil's variance, in which both Q1 and Q2 are replaced by the larger one, because it is not known which of the
    two samples varies more. It is exact for one positive sample and many negative ones, and normal for many.

    Source:
        Hanley & McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982: the variance with
        Q1 = A / (2 - A) and Q2 = 2 A^2 / (1 + A). Clopper & Pearson, "The Use of Confidence or Fiducial Limits",
        Biometrika 1934: the inversion.
    """
    from scipy.optimize import brentq
    from scipy.special import betainc

    step = 1 / (2 * positives * negatives)  # half of the distance of two areas that can be observed

    def below(true: float, place: float) -> float:
        """Return P(observed area <= place), if this is the true area."""
        largest = max(true / (2 - true), 2 * true**2 / (1 + true))
        spread = true * (1 - true)
        variance = (spread + (positives + negatives - 2) * (largest - true**2)) / (positives * negatives)
        size = max(spread / variance - 1, 1e-9)  # 0 for one pair of samples: the area is then 0 or 1
        return float(betainc(true * size, (1 - true) * size, min(max(place, 0.0), 1.0)))

    ends, tail = (1e-9, 1 - 1e-9), (1 - 0.95) / 2
    low, high = 0.0, 1.0
    # At 0 and 1 the Beta distribution has less mass within half a step than samples that are separated completely.
    under, over = auc - (step if auc < 1 else 2 * step), auc + (step if auc > 0 else 2 * step)
    if under > 0 and 1 - below(ends[0], under) < tail:
        low = float(brentq(lambda true: 1 - below(true, under) - tail, *ends))
    if over < 1 and below(ends[1], over) < tail:
        high = float(brentq(lambda true: below(true, over) - tail, *ends))
    return min(low, auc), max(high, auc)


def effective_size(weights: np.ndarray) -> float:
    """Return how many unweighted samples give a mean of the same variance: (sum w)^2 / sum w^2.

    Source:
        Kish, "Survey Sampling", 1965, section 11.7.
    """
    return float(weights.sum() ** 2 / (weights**2).sum())


def clustered_size(found: np.ndarray, clusters: np.ndarray) -> float:
    """Return how many independent samples give a share of the same variance: N, or fewer if samples are correlated.

    The variance of the share of `found`, bool [N], is estimated from `clusters`, int64 [N], and compared with that of
    independent samples. The ratio, the design effect, counts only if it exceeds 1: few clusters agree by chance too
    often to make N larger. A share of 0 or 1, and a single cluster, show no correlation.

    Source:
        Kish, "Survey Sampling", 1965, sections 5.4 and 8.2: design effect and ratio estimator of clusters.
    """
    n, share = len(found), float(np.mean(found)) if len(found) else 0.0
    names, place = np.unique(clusters, return_inverse=True)
    if len(names) < 2 or share in (0.0, 1.0):
        return float(n)
    residuals = np.bincount(place, weights=found - share)
    variance = len(names) / (len(names) - 1) * float((residuals**2).sum()) / n**2
    return n / max(1.0, variance * n / (share * (1 - share)))


def share_of(found: np.ndarray) -> Share | None:
    """Return the share of true values, bool [N], with Wilson's interval; None without a value."""
    if not len(found):
        return None
    low, high = wilson_interval(float(found.mean()), len(found))
    return Share(value=float(found.mean()), n=len(found), low=low, high=high)


def share_metric(shares: Mapping[str, float | None], n: int, size: float | None = None) -> Metric:
    """Return a metric of shares of n samples, with Wilson's interval for `size` independent ones (n by default)."""
    after = shares.get("after")
    return Metric.of(shares, n, (None, None) if after is None else wilson_interval(after, n if size is None else size))


def clustered_share_metric(shares: Mapping[str, np.ndarray], clusters: np.ndarray) -> Metric:
    """Return a metric of the true values' share, whose interval allows for clusters (`clustered_size`).

    Shares are bool [N] by model, `after` among them; clusters are int64 [N].
    """
    after = shares["after"]
    means = {model: float(share.mean()) for model, share in shares.items()}
    return share_metric(means, len(after), clustered_size(after, clusters))


def area_metric(areas: Mapping[str, float], positives: int, negatives: float) -> Metric:
    """Return a metric of areas under the ROC curve, with the interval of `auc_interval`; n counts the positives."""
    interval = auc_interval(areas["after"], positives, negatives) if "after" in areas else (None, None)
    return Metric.of(areas, positives, interval)


def mean_interval(values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a mean over at least two independent values, by Student's t.

    With weights, float64 [N], the values count as `effective_size` of them.

    Source:
        Student, "The Probable Error of a Mean", Biometrika 1908.
    """
    from scipy.stats import t

    if weights is not None:
        size = effective_size(weights)
        mean = float(np.average(values, weights=weights))
        spread = float(np.average((np.asarray(values) - mean) ** 2, weights=weights)) * size / (size - 1)
        half = float(t.ppf(0.975, size - 1)) * math.sqrt(spread / size)
        return mean - half, mean + half
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - half, mean + half


def mean_metric(values: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> Metric:
    """Return a metric of means over samples, float64 [N] by model, with Student's interval.

    Null if a value is not finite.
    """
    after = values["after"]
    found = {
        name: float(item.mean() if weights is None else np.average(item, weights=weights))
        for name, item in values.items()
        if np.isfinite(item).all()
    }
    interval = mean_interval(after, weights) if "after" in found and len(after) > 1 else (None, None)
    return Metric.of(found, len(after), interval)


def average_gap(metrics: dict[str, Metric], model: str = "after") -> float | None:
    """Return the paper's average gap: the mean of |UA, RA, TA, MIA - retrained|, as a ratio.

    None if a value or the reference is missing.

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


def stratified(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a sample of images by class, so that small classes are in it: sorted places and weights, both [size].

    Half of the sample is divided equally among the K classes, so that a class of at most `size / (2 K)` images is taken
    whole. The rest is divided in proportion to what is left of each class. Weights have mean 1, so that a weighted mean
    estimates that of all N images; `size` is at least K and less than N.

    Source:
        Cochran, "Sampling Techniques", 1977, chapter 5.
    """
    classes, counts = np.unique(labels, return_counts=True)
    taken = np.minimum(counts, max(1, size // (2 * len(classes))))
    left = counts - taken
    # Sums in whole numbers: differences of rounded sums add up to the size, and no class gets more than it has.
    sums = np.cumsum(left) * (size - int(taken.sum()))
    taken = taken + np.diff((2 * sums + left.sum()) // (2 * left.sum()), prepend=0)
    generator = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    places, weights = [], []
    for first, count, number in zip(np.cumsum(counts) - counts, counts, taken, strict=True):
        places.append(order[first + generator.choice(count, number, replace=False)])
        weights.append(np.full(number, count / number * size / len(labels)))
    chosen = np.concatenate(places)
    by_place = np.argsort(chosen)
    return chosen[by_place], np.concatenate(weights)[by_place]


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the largest distance of two empirical distribution functions, from 0 (the same values) to 1 (no overlap).

    Values are float64 [N] and [M], at least one each; `weights` are those of the second ones.

    Source:
        Smirnov, "Table for Estimating the Goodness of Fit of Empirical Distributions", Annals of Mathematical
        Statistics 1948.
    """
    places = np.concatenate([first, second])
    return float(np.abs(_shares_below(first, places, None) - _shares_below(second, places, weights)).max())


def kuiper(first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the largest distance of two empirical distribution functions upwards plus that downwards, from 0 to 1.

    Unlike Kolmogorov and Smirnov's distance, it is as sensitive to a change of the spread as to a shift: values that
    lie in the middle of the others, or on both sides of them, differ upwards and downwards. `weights` are those of the
    second values.

    Source:
        Kuiper, "Tests concerning random points on a circle", Indagationes Mathematicae 1960.
    """
    places = np.concatenate([first, second])
    apart = _shares_below(first, places, None) - _shares_below(second, places, weights)
    return float(max(apart.max(), 0.0) - min(apart.min(), 0.0))


def kuiper_interval(distance: float, n: int, m: float) -> tuple[float, float]:
    """Return the 95 % interval of Kuiper's distance of the distributions that two samples of n and m values are from.

    The distance is a seminorm, so that the observed and the true one differ by at most the distance of the errors of
    both distribution functions. Its 95 % quantile is taken for equal distributions. `m` is the effective number if the
    values are weighted.

    Source:
        Stephens, "Use of the Kolmogorov-Smirnov, Cramér-von Mises and Related Statistics Without Extensive Tables",
        JRSS B 1970: the quantile for small samples.
    """
    root = math.sqrt(n * m / (n + m))
    half = _KUIPER_95 / (root + 0.155 + 0.24 / root)
    return max(0.0, distance - half), min(1.0, distance + half)


def _shares_below(
    values: np.ndarray, places: np.ndarray, weights: np.ndarray | None, side: str = "right"
) -> np.ndarray:
    """Return the weighted share of the values up to each place (`right`), or below it (`left`)."""
    order = np.argsort(values, kind="stable")
    # Sums of equal weights are whole numbers, so that ties and shares are exact without weights.
    sums = np.concatenate([[0.0], np.cumsum((np.ones(len(values)) if weights is None else weights)[order])])
    found = np.searchsorted(values[order], places, side="left" if side == "left" else "right")
    return np.asarray(sums[found] / sums[-1])


def placements(positives: np.ndarray, negatives: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the share of the negatives that each positive scores higher than, a tie counted half: float64 [N].

    Their mean is the area under the ROC curve. `weights` are those of the negatives.

    Source:
        Hanley & Hajian-Tilaki, "Sampling variability of nonparametric estimates of the areas under receiver operating
        characteristic curves", Academic Radiology 1997.
    """
    below, up_to = (_shares_below(negatives, positives, weights, side) for side in ("left", "right"))
    return np.asarray((below + up_to) / 2)


def rank_area(positives: np.ndarray, negatives: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the area under the ROC curve: the probability that a positive scores higher, a tie counted half.

    Computed from shares of pairs, so that it does not depend on the order of the samples. `weights` are those of the
    negatives.

    Source:
        Mann & Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other",
        Annals of Mathematical Statistics 1947.
    """
    return float(placements(positives, negatives, weights).mean())


def area_change(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray], weights: np.ndarray | None = None
) -> tuple[float, tuple[float, float]]:
    """Return by how much the area under the ROC curve fell between two scores of the same samples.

    The second value is its 95 % interval. Each pair holds the scores of N positives and M negatives. The interval is of
    the paired difference, so that what both scores have in common cancels: Student's with N - 1 degrees of freedom, and
    (-1, 1) for one positive, which has no variance.

    Source:
        DeLong, DeLong & Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating
        Characteristic Curves", Biometrics 1988; weighted means and Kish's effective size for the negatives.
    """
    from scipy.stats import t

    of_positives = placements(*before, weights) - placements(*after, weights)
    fall = float(of_positives.mean())
    if len(of_positives) < 2:
        return fall, (-1.0, 1.0)
    of_negatives = placements(-before[1], -before[0]) - placements(-after[1], -after[0])
    shares = np.ones(len(of_negatives)) if weights is None else weights
    spread = float(np.average((of_negatives - np.average(of_negatives, weights=shares)) ** 2, weights=shares))
    variance = float(of_positives.var(ddof=1)) / len(of_positives) + spread / effective_size(shares)
    half = float(t.ppf(0.975, len(of_positives) - 1)) * math.sqrt(variance)
    return fall, (max(-1.0, fall - half), min(1.0, fall + half))
