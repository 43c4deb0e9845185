"""The most familiar tenth and the worst class, on values counted by hand."""

import numpy as np
import pytest

from salun_core.evaluation.evidence import ClassAccuracy
from salun_core.evaluation.optional_metrics import decile_metric, familiar_share, worst_drop_metric
from salun_core.evaluation.outputs import Outputs


def with_losses(losses):
    losses = np.array(losses, dtype=np.float64)
    return Outputs(np.full((len(losses), 2), 0.5), losses, np.zeros(len(losses), dtype=np.int64))


def test_share_below_the_first_decile_of_unseen_losses():
    test = with_losses(range(101))  # first decile: 10
    assert familiar_share(with_losses([9, 9.9, 10, 11, 50]), test) == pytest.approx(2 / 5)


def test_the_same_distribution_gives_a_tenth():
    rng = np.random.default_rng(0)
    share = familiar_share(with_losses(rng.exponential(1, 20_000)), with_losses(rng.exponential(1, 20_000)))
    assert share == pytest.approx(0.1, abs=0.01)


def test_the_metric_has_all_models_and_an_interval():
    test = with_losses(range(101))
    models = {"before": [1] * 10, "after": [1] * 3 + [50] * 7, "reference": [1] + [50] * 9}
    metric = decile_metric({name: {"forget": with_losses(v), "test": test} for name, v in models.items()})
    assert (metric.before, metric.after, metric.reference, metric.n) == (1, 0.3, 0.1, 10)
    assert 0.1 < metric.low < 0.3 < metric.high < 0.65


def test_the_class_that_lost_most_of_those_that_are_kept():
    rows = [
        ClassAccuracy(class_id=0, name="a", before=0.9, after=0.85, n=20),
        ClassAccuracy(class_id=1, name="b", before=0.9, after=0.7, n=30),
        ClassAccuracy(class_id=2, name="gone", before=1.0, after=0.0, n=40),
        ClassAccuracy(class_id=3, name="empty", before=None, after=None, n=0),
    ]
    metric = worst_drop_metric(rows, [2])
    assert (metric.before, metric.n) == (0, 30)
    assert metric.after == pytest.approx(0.2)
    assert worst_drop_metric(rows[2:], [2]).after is None
