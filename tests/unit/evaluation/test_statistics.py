"""Intervals and two-sample statistics, against published values, simulations, SciPy and double loops."""

import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from salun_core.evaluation import Metric
from salun_core.evaluation.statistics import auc_interval, average_gap, kolmogorov_smirnov, rank_area, wilson_interval


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


@pytest.mark.parametrize(("positives", "negatives"), [(30, 120), (120, 30)])
def test_the_area_interval_covers_the_spread_of_areas(positives, negatives):
    """For exponential scores, which Hanley & McNeil's approximation is exact for, the area is r / (1 + r)."""
    rng, ratio = np.random.default_rng(0), 9.0
    areas = [
        (rng.exponential(ratio, positives)[:, None] > rng.exponential(1.0, negatives)[None, :]).mean()
        for _ in range(4000)
    ]
    low, high = auc_interval(0.9, positives, negatives)
    assert (high - low) / 2 / 1.959964 == pytest.approx(np.std(areas), rel=0.04)
    assert auc_interval(1.0, 5, 5) == (1.0, 1.0)
    assert auc_interval(0.0, 5, 5) == (0.0, 0.0)


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


def test_rank_area_counts_pairs():
    rng = np.random.default_rng(4)
    positives, negatives = rng.normal(0.5, 1, 13).round(1), rng.normal(0, 1, 17).round(1)
    won = sum((p > q) + (p == q) / 2 for p in positives for q in negatives)
    assert rank_area(positives, negatives) == pytest.approx(won / (13 * 17), abs=1e-12)
    assert rank_area(positives, positives) == 0.5
