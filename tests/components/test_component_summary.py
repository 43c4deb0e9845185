"""What the evaluation shows in the user interface, also if little was measured."""

import math

import pytest

from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import Curve, DiffusionFacts, Forgotten, Integrity, Measured, RunFacts
from salun_core.pods.summary import MAX_CLASSES, confusion, roc_points, scalar_metrics


def evidence(**changes):
    fields = {
        "created_at": "2026-01-31T12:00:00+00:00",
        "measured": Measured(before="a", after="b", dataset="c", split="d", forget_set="e"),
        "forgotten": Forgotten(count=5, train_count=50, kinds=["samples"]),
        "integrity": Integrity(weights=200, weights_changed=50, non_finite=0, buffers_changed=0),
        "metrics": {"UA": Metric(before=0.0, after=0.25, n=5)},
    }
    return Evidence(**{**fields, **changes})


def test_metrics_are_named_by_state():
    assert scalar_metrics(evidence(run=RunFacts(method="salun", density=0.5, seconds={"unlearn": 2.0}))) == {
        "UA_before": 0.0,
        "UA_after": 0.25,
        "seconds_unlearn": 2.0,
        "mask_density": 0.5,
        "weights_changed_ratio": 0.25,
        "forget_ratio": 0.1,
    }


def test_values_that_are_not_numbers_are_left_out():
    metrics = {"TA": Metric(before=math.nan, after=math.inf, reference=None, n=0)}
    found = scalar_metrics(evidence(metrics=metrics, run=RunFacts(seconds={"mask": math.nan})))
    assert set(found) == {"weights_changed_ratio", "forget_ratio"}


def test_equal_class_names_are_made_distinct():
    names, rows = confusion(evidence(classes=["cat", "dog", "cat"], confusion=[[1, 0, 0], [0, 2, 0], [0, 1, 3]]))
    assert names == ["cat (0)", "dog (1)", "cat (2)"]
    assert rows == [[1, 0, 0], [0, 2, 0], [0, 1, 3]]


@pytest.mark.parametrize("count", [0, MAX_CLASSES + 1])
def test_no_matrix_if_it_does_not_fit(count):
    rows = [[0] * count for _ in range(count)]
    assert confusion(evidence(classes=[str(index) for index in range(count)], confusion=rows)) is None


def test_thresholds_of_the_roc_curve_are_finite_and_fall():
    curve = Curve(fpr=[0.0, 0.5, 1.0], tpr=[0.0, 0.75, 1.0], auc=0.625)
    assert roc_points(evidence(roc={"after": curve})) == ([0.0, 0.5, 1.0], [0.0, 0.75, 1.0], [1.0, 0.5, 0.0])
    assert roc_points(evidence()) is None
    assert roc_points(evidence(roc={"after": Curve(fpr=[], tpr=[], auc=0.5)})) is None


def test_generated_images_give_distances_a_matrix_and_no_curve():
    made = DiffusionFacts(sampler="DDIMScheduler", steps=50, guidance_scale=2.0, seed=1, images=20)
    metrics = {"UA": Metric(before=0.1, after=1.0, n=5), "FID": Metric(before=31.5, after=33.25, n=20)}
    found = evidence(metrics=metrics, generation=made, classes=["a", "b"], confusion=[[0, 5], [1, 14]])
    numbers = scalar_metrics(found)
    assert (numbers["FID_before"], numbers["FID_after"], numbers["UA_after"]) == (31.5, 33.25, 1.0)
    assert confusion(found) == (["a", "b"], [[0, 5], [1, 14]])
    assert roc_points(found) is None


@pytest.mark.parametrize("rows", [[[5, 0]], [[5, 0], [5]], [[5, 0, 0], [5, 0, 0]]])
def test_matrix_of_a_wrong_shape_is_left_out(rows):
    assert confusion(evidence(classes=["a", "b"], confusion=rows)) is None
