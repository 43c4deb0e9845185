"""Intervals and two-sample statistics, against published values, simulations, SciPy and double loops."""

import math

import numpy as np
import pytest
from scipy.stats import ks_2samp, t

from salun_core.evaluation import Metric
from salun_core.evaluation.statistics import (
    area_change,
    auc_interval,
    average_gap,
    clustered_size,
    effective_size,
    kolmogorov_smirnov,
    kuiper,
    kuiper_interval,
    rank_area,
    share_power,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Brown, Cai & DasGupta, Statistical Science 2001; Newcombe, Statistics in Medicine 1998
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_as_published(hits, n, low, high):
    assert wilson_interval(hits / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_solve_its_equation():
    for share, n in ((0.3, 17), (0.95, 400), (0.5, 1)):
        for end in wilson_interval(share, n):
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)


@pytest.mark.parametrize(
    ("positives", "negatives", "ratio", "narrow"),
    [(1, 300, 1.0, False), (3, 300, 1.0, False), (5, 200, 4.0, True), (50, 20, 1.0, True), (200, 300, 1.0, True)],
)
def test_the_area_interval_covers_the_true_area(positives, negatives, ratio, narrow):
    """For exponential scores, which Hanley & McNeil's variance is exact for, the area is r / (1 + r)."""
    rng, true, draws = np.random.default_rng(0), ratio / (1 + ratio), 400
    areas = [rank_area(rng.exponential(ratio, positives), rng.exponential(1.0, negatives)) for _ in range(draws)]
    intervals = [auc_interval(area, positives, negatives) for area in areas]
    missed = [sum(low > true for low, _ in intervals) / draws, sum(high < true for _, high in intervals) / draws]
    assert max(missed) <= 0.05  # 0.025 is expected on each side, and 0.05 lies three deviations above it
    if narrow:  # it is not wide because it is useless
        assert sum(missed) > 0.01


def test_one_sample_says_nothing_and_an_area_of_one_has_an_interval():
    assert auc_interval(0.9, 1, 300)[0] < 0.5 < auc_interval(0.1, 1, 300)[1]
    assert auc_interval(0.5, 1, 1) == (0.0, 1.0)
    for area, end in ((1.0, 1), (0.0, 0)):
        low, high = auc_interval(area, 5, 5)
        assert (low, high)[end] == area
        # Scores whose area is 0.655 separate 5 from 5 completely in 2.5 % of 200,000 draws.
        assert high - low == pytest.approx(1 - 0.655, abs=0.02)
    many = auc_interval(0.5, 400, 400)
    assert many == pytest.approx((0.46, 0.54), abs=0.002)  # 0.5 -+ 1.96 sqrt(801 / (12 * 400 * 400))


def test_effective_size_is_kishs():
    assert effective_size(np.ones(7)) == 7
    assert effective_size(np.array([2.0, 2.0, 0.0])) == 2
    assert effective_size(np.array([3.0, 1.0])) == pytest.approx(16 / 10)


def test_weights_count_like_copies():
    rng = np.random.default_rng(5)
    positives, negatives = rng.normal(0.5, 1, 13).round(1), rng.normal(0, 1, 9).round(1)
    copies = np.array([1, 2, 0, 3, 1, 1, 4, 0, 2])
    repeated, weights = np.repeat(negatives, copies), copies.astype(float)
    assert rank_area(positives, negatives, weights) == pytest.approx(rank_area(positives, repeated), abs=1e-12)
    found = kolmogorov_smirnov(positives, negatives, weights)
    assert found == pytest.approx(kolmogorov_smirnov(positives, repeated), abs=1e-12)


def delongs_variance(before, after):
    """Restated for equal weights, from DeLong's placement values of each sample, one pair at a time."""

    def won(high, low):
        return (high > low) + (high == low) / 2

    def values(scores):
        first, second = scores
        v10 = [np.mean([won(x, y) for y in second]) for x in first]
        v01 = [np.mean([won(x, y) for x in first]) for y in second]
        return np.array(v10), np.array(v01)

    (b10, b01), (a10, a01) = values(before), values(after)
    return np.var(b10 - a10, ddof=1) / len(b10) + np.var(b01 - a01) / len(b01)


def test_a_fall_of_the_area_has_delongs_paired_interval():
    rng = np.random.default_rng(6)
    before = rng.normal(1.0, 1, 30), rng.normal(0, 1, 40)
    after = before[0] - rng.normal(0.8, 0.3, 30), before[1] + rng.normal(0, 0.3, 40)
    fall, (low, high) = area_change(before, after)
    assert fall == pytest.approx(rank_area(*before) - rank_area(*after), abs=1e-12)
    half = t.ppf(0.975, 29) * math.sqrt(delongs_variance(before, after))
    assert (low, high) == pytest.approx((fall - half, fall + half), abs=1e-9)
    assert low > 0
    unpaired = auc_interval(rank_area(*after), 30, 40)
    assert high - low < unpaired[1] - unpaired[0]
    assert area_change(before, before) == (0.0, (0.0, 0.0))
    assert area_change((before[0][:1], before[1]), (after[0][:1], after[1]))[1] == (-1.0, 1.0)


def test_scaling_the_scores_is_no_change():
    rng = np.random.default_rng(7)
    scores = rng.normal(1.0, 1, 30), rng.normal(0, 1, 40)
    assert area_change(scores, (1000 * scores[0], 1000 * scores[1])) == (0.0, (0.0, 0.0))


def metric(before, after, reference):
    return Metric(before=before, after=after, reference=reference, n=1)


def test_the_papers_gap_for_its_own_table():
    """SalUn, CIFAR-10, 10 %: UA 2.85, RA 99.62, TA 93.93, MIA 14.39 against Retrain: gap 1.15."""
    values = {"UA": (2.85, 5.24), "RA": (99.62, 100), "TA": (93.93, 94.26), "MIA": (14.39, 12.88)}
    metrics = {name: metric(0, a / 100, r / 100) for name, (a, r) in values.items()}
    assert average_gap(metrics) == pytest.approx(0.0115, abs=5e-5)
    for broken in ("missing", "none", "no reference"):
        other = dict(metrics)
        if broken == "missing":
            del other["MIA"]
        else:
            other["TA"] = metric(0, None, 1) if broken == "none" else metric(0, 1, None)
        assert average_gap(other) is None


@pytest.mark.parametrize(("n", "m", "seed"), [(1, 1, 0), (1, 9, 1), (40, 25, 2), (100, 100, 3)])
def test_kolmogorov_smirnov_equals_scipy(n, m, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.exponential(1.0, n).round(1), rng.exponential(1.5, m).round(1)  # with ties
    assert kolmogorov_smirnov(first, second) == pytest.approx(ks_2samp(first, second).statistic, abs=1e-12)


def test_same_values_are_not_apart_and_disjoint_ones_are_fully():
    values = np.arange(5.0)
    assert kolmogorov_smirnov(values, values[::-1]) == 0
    assert kolmogorov_smirnov(values, values + 10) == 1


def test_kuipers_distance_adds_both_directions():
    """Its quantile is astropy's: kuiper_false_positive_probability(1.7473 / 100, 10_000) is 0.05."""
    values = np.arange(10.0)
    assert kuiper(values, values[::-1]) == 0
    assert kuiper(values, values + 10) == kuiper(values + 10, values) == 1
    assert kuiper(np.array([4.5]), values) == pytest.approx(1.0)  # half of the others below, half above
    outside = np.array([-1.0, -1.0, 10.0, 10.0])
    assert kuiper(outside, values) == pytest.approx(1.0)
    assert kolmogorov_smirnov(outside, values) == pytest.approx(0.5)
    weights = np.array([1.0, 2, 0, 3, 1, 1, 4, 0, 2, 1])
    repeated = np.repeat(values, weights.astype(int))
    assert kuiper(outside + 3, values, weights) == pytest.approx(kuiper(outside + 3, repeated), abs=1e-12)
    terms = (2 * (4 * j**2 * 1.7473**2 - 1) * np.exp(-2 * j**2 * 1.7473**2) for j in range(1, 20))
    assert sum(terms) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("n", [1, 5, 20, 200])
def test_the_interval_of_kuipers_distance_covers_the_true_one(n):
    """Samples of one distribution, whose true distance is 0, and of two whose true distance is that of 100,000."""
    rng = np.random.default_rng(n)
    far = kuiper(rng.normal(0, 0.5, 100_000), rng.normal(0, 1, 100_000))
    for scale, true in ((1.0, 0.0), (0.5, far)):
        pairs = [(rng.normal(0, scale, n), rng.normal(0, 1, 700)) for _ in range(300)]
        ends = [kuiper_interval(kuiper(*pair), n, 700) for pair in pairs]
        assert np.mean([low <= true <= high for low, high in ends]) >= 0.91
        assert all(0 <= low <= high <= 1 for low, high in ends)
    assert kuiper_interval(0.5, 400, 700)[1] - kuiper_interval(0.5, 20, 700)[1] < -0.2


def test_rank_area_counts_pairs():
    rng = np.random.default_rng(4)
    positives, negatives = rng.normal(0.5, 1, 13).round(1), rng.normal(0, 1, 17).round(1)
    won = sum((p > q) + (p == q) / 2 for p in positives for q in negatives)
    assert rank_area(positives, negatives) == pytest.approx(won / (13 * 17), abs=1e-12)
    assert rank_area(positives, positives) == pytest.approx(0.5, abs=1e-12)


def test_samples_of_a_cluster_count_once_if_they_are_alike():
    clusters = np.repeat(np.arange(30), 16)
    alike = np.repeat(np.arange(30) % 3 > 0, 16)
    assert clustered_size(alike, clusters) == pytest.approx(29)  # K - 1, by Bessel's correction
    independent = np.random.default_rng(0).random(480) < 0.5
    assert 200 < clustered_size(independent, clusters) <= 480
    assert clustered_size(np.tile([True, False], 240), clusters) == 480  # never more than there are
    assert clustered_size(np.ones(480, bool), clusters) == 480
    assert clustered_size(alike, np.zeros(480, int)) == 480


@pytest.mark.parametrize(("correlated", "least"), [(False, 0.93), (True, 0.85)])
def test_the_interval_of_clusters_covers_where_the_plain_one_does_not(correlated, least):
    rng = np.random.default_rng(7)
    clusters, covered = np.repeat(np.arange(12), 8), []
    for _ in range(400):
        shares = rng.beta(1.4, 0.6, 12) if correlated else np.full(12, 0.7)
        found = rng.random(96) < np.repeat(shares, 8)
        sizes = (96, clustered_size(found, clusters))
        intervals = [wilson_interval(found.mean(), size) for size in sizes]
        covered.append([low <= 0.7 <= high for low, high in intervals])
    plain, clustered = np.mean(covered, axis=0)
    assert clustered >= least
    assert plain < 0.75 if correlated else plain >= 0.9


def test_the_power_of_a_share_is_what_a_simulation_finds():
    rng = np.random.default_rng(3)
    counts = rng.binomial(60, 0.95, 4000)
    above = np.mean([wilson_interval(count / 60, 60)[0] >= 0.85 for count in counts])
    assert share_power(0.95, 60, 0.85, above=True) == pytest.approx(above, abs=0.03)
    below = np.mean([wilson_interval(1 - count / 60, 60)[1] <= 0.15 for count in counts])
    assert share_power(0.05, 60, 0.15, above=False) == pytest.approx(below, abs=0.03)
    assert share_power(1.0, 21, 0.85, above=True) == 0
    assert share_power(1.0, 22, 0.85, above=True) == 1
