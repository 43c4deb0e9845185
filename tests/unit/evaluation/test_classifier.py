"""UA, RA, TA and the other figures of a classifier, against plain loops over images."""

import json

import numpy as np
import pytest
import torch

from salun_core.errors import DataError
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.classifier import BINS, accuracy_by_class, confusion
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.evaluation.membership import confidence_attack, entropy_attack
from salun_core.evaluation.outputs import Outputs, outputs_of

MEASURED = Measured(before="a", after="b", dataset="c", split="d", forget_set="e")


def accuracy(model, images, keep=lambda label: True):
    """Count over images, in batches of another size than those of the evaluation."""
    hits, count = 0, 0
    with torch.no_grad():
        for inputs, labels in images.batches(23):
            for found, label in zip(model(inputs).argmax(1).tolist(), labels.tolist(), strict=True):
                if keep(label):
                    hits += found == label
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


@pytest.mark.slow
def test_accuracies_equal_loops_over_images(lab, three, evidence):
    forget, retain = lab.parts("class")
    for state, model in zip(("before", "after", "reference"), three, strict=True):
        assert getattr(evidence.metrics["UA"], state) == pytest.approx(1 - accuracy(model, forget), abs=1e-12)
        assert getattr(evidence.metrics["RA"], state) == pytest.approx(accuracy(model, retain), abs=1e-12)
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
    test = test.where(test.labels != 3)  # unseen images of retained classes, as in the paper
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


def test_single_samples_are_measured_apart_from_whole_classes(lab):
    forget, retain = lab.train.select(range(100)), lab.train.select(range(100, 400))
    forgotten = Forgotten(count=100, train_count=400, kinds=["class", "samples"], classes=[3])
    found = evaluate_classifier(lab.model, lab.model, Splits(forget, retain, lab.test), MEASURED, forgotten)
    whole = int((forget.labels == 3).sum())
    assert (found.metrics["UA_class"].n, found.metrics["UA_samples"].n) == (whole, 100 - whole)
    assert found.metrics["attack_auc"].n == 100 - whole
    assert found.metrics["UA"].n == 100


def test_the_attack_on_a_whole_class_compares_it_with_unseen_images_of_the_class(lab, three, evidence):
    forget = outputs_of(three[1], lab.parts("class")[0])
    test = outputs_of(three[1], lab.test)
    same = test.margins[test.labels == 3]
    won = (forget.margins[:, None] > same[None, :]) + (forget.margins[:, None] == same[None, :]) / 2
    assert evidence.metrics["attack_auc"].after == pytest.approx(won.mean(), abs=1e-9)
    assert evidence.metrics["UA_unseen"].after == pytest.approx(1 - accuracy(three[1], lab.test, lambda i: i == 3))


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
