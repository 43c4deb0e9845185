"""UA, RA, TA and what goes with them, against plain loops over images."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import DataError, ModelError
from salun_core.evaluation import Evidence, Metric, Splits, evaluate_classifier
from salun_core.evaluation.classifier import BINS, accuracy_by_class, confusion
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.evaluation.integrity import compare_weights
from salun_core.evaluation.membership import confidence_attack, entropy_attack
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import auc_interval, average_gap, wilson_interval
from salun_core.saliency import SaliencyMask

MEASURED = Measured(before="a", after="b", dataset="c", split="d", forget_set="e")


def accuracy(model, images, keep=lambda label: True):
    """One image at a time."""
    hits, count = 0, 0
    with torch.no_grad():
        for inputs, labels in images.batches(1):
            if keep(int(labels)):
                hits += int(model(inputs).argmax()) == int(labels)
                count += 1
    return hits / count


@pytest.fixture(scope="module")
def three(lab):
    """Before, after and a model retrained without the class."""
    return lab.model, lab.unlearn("class"), lab.unlearn("class", "finetune", learning_rate=0.02)


@pytest.fixture(scope="module")
def evidence(lab, three):
    forget, retain = lab.parts("class")
    forgotten = Forgotten(count=len(forget), train_count=len(lab.train), kinds=["class"], classes=[3])
    return evaluate_classifier(
        three[0], three[1], Splits(forget, retain, lab.test), MEASURED, forgotten, reference=three[2]
    )


def test_accuracies_equal_loops_over_images(lab, three, evidence):
    forget, retain = lab.parts("class")
    few = ImageSet(retain.images, retain.labels, retain.normalisation)
    for state, model in zip(("before", "after", "reference"), three, strict=True):
        assert getattr(evidence.metrics["UA"], state) == pytest.approx(1 - accuracy(model, forget), abs=1e-12)
        assert getattr(evidence.metrics["RA"], state) == pytest.approx(accuracy(model, few), abs=1e-12)
        without = accuracy(model, lab.test, lambda label: label != 3)
        assert getattr(evidence.metrics["TA"], state) == pytest.approx(without, abs=1e-12)
    assert evidence.metrics["UA"].n == evidence.metrics["UA_class"].n == len(forget)
    assert evidence.metrics["RA"].n == len(retain)
    assert evidence.metrics["TA"].n == int((lab.test.labels != 3).sum()) < len(lab.test)
    assert "UA_samples" not in evidence.metrics


def test_the_forgotten_class_stays_in_the_table_and_the_matrix(lab, three, evidence):
    rows = {row.class_id: row for row in evidence.per_class}
    assert rows[3].after == pytest.approx(accuracy(three[1], lab.test, lambda label: label == 3))
    assert rows[3].before > 0.9 > 0.2 > rows[3].after
    assert sum(row.n for row in evidence.per_class) == len(lab.test)
    matrix = np.array(evidence.confusion)
    assert matrix.sum() == len(lab.test)
    assert matrix.sum(axis=1).tolist() == np.bincount(lab.test.labels, minlength=10).tolist()
    assert matrix.trace() / matrix.sum() == pytest.approx(accuracy(three[1], lab.test))


def test_attacks_see_the_test_set_without_the_class(lab, three, evidence):
    forget, retain = (outputs_of(three[1], images) for images in lab.parts("class"))
    test = outputs_of(three[1], lab.test)
    test = test.where(test.labels != 3)
    assert evidence.metrics["MIA"].after == confidence_attack(retain, test, forget).mean()
    assert evidence.metrics["MIA_entropy"].after == entropy_attack(retain, test, forget).mean()


def test_the_gap_is_the_mean_distance_to_the_reference(evidence):
    for state in ("before", "after"):
        parts = [
            abs(getattr(evidence.metrics[name], state) - evidence.metrics[name].reference)
            for name in ("UA", "RA", "TA", "MIA")
        ]
        assert getattr(evidence.metrics["gap"], state) == pytest.approx(sum(parts) / 4)


def test_intervals_hold_the_value(evidence):
    for name in ("UA", "RA", "TA", "MIA", "MIA_entropy", "attack_auc"):
        metric = evidence.metrics[name]
        assert 0 <= metric.low <= metric.after <= metric.high <= 1, name


def test_evidence_survives_a_file(evidence):
    text = json.dumps(evidence.model_dump(mode="json"), allow_nan=False)
    assert Evidence.model_validate_json(text) == evidence


def test_histograms_count_every_image(lab, evidence):
    forget, retain = lab.parts("class")
    sizes = {"forget": len(forget), "retain": len(retain), "test": int((lab.test.labels != 3).sum())}
    for quantity in ("loss", "confidence"):
        found = evidence.distributions[quantity]
        assert len(found.edges) == BINS + 1
        for split, series in found.splits.items():
            assert sum(series.before) == sum(series.after) == sum(series.reference) == sizes[split]


def test_single_samples_beside_a_class_are_judged_apart(lab):
    forget, retain = lab.train.select(range(100)), lab.train.select(range(100, 400))
    forgotten = Forgotten(count=100, train_count=400, kinds=["class", "samples"], classes=[3])
    found = evaluate_classifier(lab.model, lab.model, Splits(forget, retain, lab.test), MEASURED, forgotten)
    whole = int((forget.labels == 3).sum())
    assert (found.metrics["UA_class"].n, found.metrics["UA_samples"].n) == (whole, 100 - whole)
    assert found.metrics["attack_auc"].n == 100 - whole
    assert found.metrics["UA"].n == 100


@pytest.mark.parametrize("name", ["forget", "retain", "test"])
def test_empty_splits_are_refused(lab, name):
    parts = {"forget": lab.train, "retain": lab.train, "test": lab.test}
    parts[name] = parts[name].select([])
    with pytest.raises(DataError, match=f"{name} split is empty"):
        evaluate_classifier(
            lab.model, lab.model, Splits(**parts), MEASURED, Forgotten(count=1, train_count=2, kinds=[])
        )


def test_a_test_set_of_forgotten_classes_alone_is_refused(lab):
    threes = lab.test.select((lab.test.labels == 3).nonzero().flatten())
    forgotten = Forgotten(count=1, train_count=2, kinds=["class"], classes=[3])
    with pytest.raises(DataError, match="no test image is left"):
        evaluate_classifier(lab.model, lab.model, Splits(lab.train, lab.train, threes), MEASURED, forgotten)


def test_a_model_of_nan_gets_no_attack_and_is_always_wrong(lab, copy_of):
    with torch.no_grad():
        copy_of.fc.weight.fill_(float("nan"))
    found = lab.evidence("class", copy_of)
    assert found.metrics["UA"].after == 1.0
    assert found.metrics["RA"].after == 0.0
    assert [found.metrics[name].after for name in ("MIA", "MIA_entropy", "attack_auc")] == [None] * 3
    assert found.metrics["MIA"].before is not None
    assert found.integrity.non_finite == copy_of.fc.weight.numel()
    json.dumps(found.model_dump(mode="json"), allow_nan=False)


def test_outputs_are_those_of_eval_mode_and_modes_are_kept(lab, copy_of):
    copy_of.train()
    copy_of.bn1.eval()
    modes = [module.training for module in copy_of.modules()]
    statistics = copy_of.bn1.running_mean.clone()
    found = outputs_of(copy_of, lab.test, batch_size=100)
    assert [module.training for module in copy_of.modules()] == modes
    assert torch.equal(copy_of.bn1.running_mean, statistics)
    expected = outputs_of(lab.model, lab.test, batch_size=7)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    assert found.probabilities.dtype == np.float64
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(found.losses, -np.log(found.confidences), rtol=1e-6)
    assert len(outputs_of(lab.model, lab.test.select([]))) == 0


def test_predictions_and_what_is_right():
    p = np.array([[0.5, 0.5], [0.2, 0.8], [np.nan, np.nan], [0.9, 0.1]])
    some = Outputs(p, np.zeros(4), np.array([0, 0, 0, 0]))
    assert some.predictions[:2].tolist() == [0, 1]
    assert some.correct.tolist() == [True, False, False, True]
    assert some.where(np.array([1, 3])).confidences.tolist() == [0.2, 0.9]


def test_tables_by_hand():
    p = np.eye(3)[[0, 1, 1, 2, 0]]
    some = Outputs(p, np.zeros(5), np.array([0, 0, 1, 1, 1]))
    assert confusion(some, 3) == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    rows = accuracy_by_class(some, some, ["a", "b", "c"])
    assert [(row.name, row.before, row.n) for row in rows] == [
        ("a", 0.5, 2),
        ("b", pytest.approx(1 / 3), 3),
        ("c", None, 0),
    ]


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


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, -0.0, 1.0], [2.0, float("nan"), 3.0]]))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
        self.none = nn.Parameter(torch.empty(0, 2))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(3))


def test_weights_are_compared_bit_by_bit():
    before, after = Tiny(), Tiny()
    assert compare_weights(before, after).model_dump() == {
        "weights": 7,
        "weights_changed": 0,
        "frozen_changed": None,
        "non_finite": 1,
        "buffers_changed": 0,
    }
    mask = SaliencyMask.from_scores(
        {"weight": torch.tensor([[5.0, 1.0, 5.0], [5.0, 1.0, 5.0]]), "scale": torch.tensor(0.0), "none": after.none},
        4 / 7,
    )
    with torch.no_grad():
        after.weight[0, 0] = -0.0  # salient; equal as a number, another bit
        after.weight[0, 1] = 0.0  # frozen
        after.scale += 0.01
        after.mean[2] = float("inf")
        after.count += 1
    found = compare_weights(before, after, mask)
    assert found.weights_changed == 3
    assert found.frozen_changed == 2
    assert found.non_finite == 2
    assert found.buffers_changed == 2


def test_memory_layout_is_no_difference(lab):
    other = copy.deepcopy(lab.model).to(memory_format=torch.contiguous_format)
    assert compare_weights(lab.model, other).weights_changed == 0


def test_models_that_cannot_be_compared_are_refused(lab):
    others = [nn.Linear(2, 2), copy.deepcopy(lab.model).double(), copy.deepcopy(lab.model)]
    others[2].register_buffer("more", torch.zeros(1))
    for other in others:
        with pytest.raises(ModelError, match="the two models differ"):
            compare_weights(lab.model, other)
    with pytest.raises(ModelError, match="does not fit"):
        compare_weights(lab.model, lab.model, SaliencyMask.full({"w": (2,)}))
