"""The two-sample statistics, against SciPy and a double loop."""

import numpy as np
import pytest
from scipy.stats import ks_2samp

from salun_core.evaluation.statistics import kolmogorov_smirnov, rank_area


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
