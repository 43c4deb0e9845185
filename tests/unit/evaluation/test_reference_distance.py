"""KL and ToW against sums written out."""

import math

import numpy as np
import pytest

from salun_core.evaluation.optional_metrics import kl_divergences, kl_metrics, tow_metric, tug_of_war
from salun_core.evaluation.outputs import Outputs


def outputs(rows, labels):
    probabilities = np.array(rows, dtype=np.float64)
    losses = -np.log(probabilities[np.arange(len(labels)), labels])
    return Outputs(probabilities, losses, np.array(labels))


def drawn(seed, n=30, classes=4):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes))
    rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return outputs(rows, np.random.default_rng(99).integers(0, classes, n))


def test_kl_is_the_sum_over_classes():
    reference = outputs([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], [0, 0])
    model = outputs([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]], [0, 0])
    by_hand = [0.5 * math.log(2) + 0.25 * math.log(0.5), math.log(2)]
    assert kl_divergences(reference, model) == pytest.approx(by_hand, abs=1e-12)
    assert kl_divergences(reference, reference) == pytest.approx([0, 0], abs=1e-12)


def test_kl_metric_has_mean_and_normal_interval():
    models = {name: {"forget": drawn(seed), "test": drawn(seed + 10)} for seed, name in enumerate(("before", "after"))}
    models["reference"] = {"forget": drawn(7), "test": drawn(8)}
    metric = kl_metrics(models)["KL_forget"]
    r, p = models["reference"]["forget"].probabilities, models["after"]["forget"].probabilities
    each = (r * np.log(r / p)).sum(axis=1)
    assert metric.after == pytest.approx(each.mean())
    assert metric.high - metric.after == pytest.approx(1.96 * each.std(ddof=1) / math.sqrt(30), rel=1e-4)
    assert (metric.reference, metric.n) == (0, 30)
    assert metric.before != metric.after


def test_tug_of_war_is_the_product_of_three_agreements():
    right, wrong = [0.9, 0.1], [0.1, 0.9]

    def with_hits(hits):
        return {
            name: outputs([right] * count + [wrong] * (10 - count), [0] * 10)
            for name, count in zip(("forget", "retain", "test"), hits, strict=True)
        }

    reference, model = with_hits((6, 10, 9)), with_hits((8, 9, 9))
    assert tug_of_war(reference, model) == pytest.approx((1 - 0.2) * (1 - 0.1) * 1)
    assert tug_of_war(reference, reference) == 1
    metric = tow_metric({"before": with_hits((10, 10, 10)), "after": model, "reference": reference})
    assert metric.before == pytest.approx(0.6 * 1 * 0.9)
    assert metric.reference == 1


def test_without_a_reference_nothing_is_measured():
    models = {name: {"forget": drawn(1), "retain": drawn(2), "test": drawn(3)} for name in ("before", "after")}
    assert tow_metric(models).after is None
    assert kl_metrics(models)["KL_test"].after is None
