"""Means over runs with Student's interval."""

import numpy as np
import pytest
from scipy import stats

from salun_core.evaluation.optional_metrics import mean_interval, run_figures, seed_metrics
from salun_core.evaluation.outputs import outputs_of


def test_interval_equals_scipy():
    values = [0.10, 0.14, 0.11, 0.2]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean_interval(values) == pytest.approx((low, high))


def test_metrics_count_runs():
    runs = [{"UA": 0.1, "RA": 1.0, "TA": 0.9, "attack_auc": 0.5}, {"UA": 0.3, "RA": 1.0, "TA": 0.8, "attack_auc": 0.6}]
    found = seed_metrics({"UA": 0.0, "RA": 1.0, "TA": 0.9, "attack_auc": 0.7}, runs)
    assert (found["UA_seeds"].after, found["UA_seeds"].n, found["UA_seeds"].before) == (pytest.approx(0.2), 2, 0.0)
    assert found["RA_seeds"].low == found["RA_seeds"].high == 1
    assert found["TA_seeds"].low < 0.8 < 0.9 < found["TA_seeds"].high


def test_figures_of_a_run_are_those_of_the_evaluation(lab, forgotten_class):
    model, _, evidence = forgotten_class
    forget, retain = lab.parts("class")
    kept = lab.test.select([i for i, label in enumerate(lab.test.labels.tolist()) if label != 3])
    splits = {"forget": forget, "retain": retain, "test": kept}
    found = run_figures({name: outputs_of(model, images) for name, images in splits.items()})
    for name, value in found.items():
        assert value == pytest.approx(evidence.metrics[name].after, abs=1e-9)
