"""The numbers in the pictures, and the words and formats of the page."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.evaluation.evidence import ClassAccuracy, Curve, Distribution, Series
from salun_core.report import Ancestor, ReportContext, plots, wording
from salun_core.report.plots import label

COUNTS = st.lists(st.integers(0, 10_000), min_size=4, max_size=4)


def _pair(forget, test):
    splits = {"forget": Series(before=[], after=forget), "test": Series(before=[], after=test)}
    return Distribution(edges=[0.0, 1.0, 2.0, 3.0, 4.0], splits=splits)


@given(COUNTS, COUNTS)
def test_overlap_is_one_minus_the_total_variation(forget, test):
    found = plots.overlap(_pair(forget, test), "after")
    if not sum(forget) or not sum(test):
        assert found is None
        return
    p, q = np.array(forget) / sum(forget), np.array(test) / sum(test)
    assert found == pytest.approx(1 - np.abs(p - q).sum() / 2, abs=1e-12)


def test_overlap_of_a_missing_split_is_none():
    only = Distribution(edges=[0.0, 1.0], splits={"forget": Series(before=[1], after=[1])})
    assert plots.overlap(only, "after") is None
    assert plots.overlap(_pair([1, 0, 0, 0], [1, 0, 0, 0]), "reference") is None


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        (list(np.geomspace(1e-4, 20, 50)), True),
        (list(np.linspace(0, 1, 50)), False),
        (list(np.linspace(1, 2, 50)), False),
        ([0.0, 1.0, 10.0], False),
        ([1.0, 10.0], False),
        ([1.0, 1.0, 1.0], False),
    ],
)
def test_geometric_bins_are_recognised(edges, expected):
    assert plots.is_geometric(edges) is expected


def test_the_alternative_text_of_histograms_has_the_medians():
    picture = plots.distributions("loss", _pair([0, 0, 9, 1], [8, 2, 0, 0]))
    words = ElementTree.fromstring(picture).attrib["aria-label"]
    assert words == "Histograms of loss by split. After: medians near test 0.5, forget 2.5."


@given(st.lists(st.integers(), max_size=2000), st.integers(2, 600))
def test_thinning_keeps_both_ends_and_the_order(points, limit):
    kept = plots.thin(points, limit)
    assert len(kept) == min(len(points), limit)
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    rest = iter(points)
    assert all(any(item == other for other in rest) for item in kept)


def test_the_classes_that_changed_most_are_drawn():
    rows = [ClassAccuracy(class_id=i, name=f"class-{i}", before=0.9, after=0.9 - i / 1000, n=10) for i in range(100)]
    rows.append(ClassAccuracy(class_id=100, name="unmeasured", before=None, after=0.5, n=0))
    text = "".join(ElementTree.fromstring(plots.class_accuracy(rows, [99])).itertext())
    assert "class-99 (forgotten)" in text
    assert "class-60" in text
    assert "class-59" not in text
    assert "unmeasured" not in text
    assert "-9.9" in text


def test_the_legend_of_each_curve_has_its_area():
    curve = Curve(fpr=[0.0, 1.0], tpr=[0.0, 1.0], auc=0.5)
    picture = plots.roc({"reference": curve, "before": curve.model_copy(update={"auc": 0.87654})})
    text = "".join(ElementTree.fromstring(picture).itertext())
    assert "before, AUC 0.8765" in text
    assert "retrained reference, AUC 0.5000" in text
    assert "after" not in text


def test_the_mask_is_grouped_by_block():
    density = {"stem.weight": 0.1, **{f"layer1.{i}.weight": 0.5 for i in range(9)}, "head.weight": 0.9}
    root = ElementTree.fromstring(plots.mask_density(density, 0.4321))
    text = "".join(root.itertext())
    assert all(name in text for name in ("stem", "layer1", "head", "whole mask 43.21%"))
    assert root.attrib["aria-label"].endswith("Lowest density: stem.weight 10.0%; highest: head.weight 90.0%.")


@given(st.text(max_size=60), st.integers(2, 30))
def test_a_label_is_short_and_printable(text, limit):
    found = label(text, limit)
    assert len(found) <= limit
    assert all(c.isprintable() or c.isspace() for c in found)


@pytest.mark.parametrize(
    ("metric", "text", "expected"),
    [
        ("RA", ">= 0.9798", "≥ 97.98 %"),
        ("UA", "<= 0.0500", "≤ 5.00 %"),
        ("UA", "<= -0.0100", "≤ -1.00 %"),
        ("UA", "within 0.0600 ± 0.0300", "within 6.00 % ± 3.00 pp"),
        ("attack_auc", "within 0.5000 ± 0.0500", "within 0.5000 ± 0.0500"),
        ("UA", "0.0600", "6.00 %"),
        ("UA", "none", "none"),
        (None, "0 changed", "0 changed"),
    ],
)
def test_thresholds_are_shown_as_percentages(metric, text, expected):
    assert wording.threshold(metric, text).replace(wording.NBSP, " ") == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_number_is_a_dash(value):
    assert wording.number("UA", value) == wording.MISSING
    assert wording.margin("UA", value) == wording.MISSING
    assert wording.interval("UA", value, 0.5) == ""


@pytest.mark.parametrize(
    ("methods", "method", "ratio", "runs"),
    [
        (["train"], "salun", 100 / 1000, 1),
        (["train", "salun"], "salun", 150 / 1050, 2),
        (["train", "salun", "retrain"], "salun", 100 / 1000, 1),
        (["train", "salun", "retrain", "salun", "salun"], "salun", 200 / 1100, 3),
        (["train", "salun"], "retrain", 0.0, 0),
    ],
)
def test_debt_counts_from_the_last_full_training(methods, method, ratio, runs):
    lineage = [Ancestor(version="v", method=m, forgotten=0 if m == "train" else 50, published_at="t") for m in methods]
    debt = ReportContext(model_line="line", created_at="t", lineage=lineage).debt(100, 1000, method)
    assert (debt.debt, debt.runs_since_training) == (pytest.approx(ratio), runs)
    assert debt.retraining_recommended is (ratio >= 0.05)


def test_retraining_is_recommended_from_ten_runs():
    def debt(runs):
        lineage = [Ancestor(version="v", method="salun", published_at="t") for _ in range(runs)]
        return ReportContext(model_line="line", created_at="t", lineage=lineage).debt(1, 100_000, "salun")

    assert [debt(runs).retraining_recommended for runs in (9, 10)] == [False, True]
    assert ReportContext(model_line="line", created_at="t").debt(1, 10, "salun") is None
