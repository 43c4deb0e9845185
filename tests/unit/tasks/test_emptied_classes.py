"""A class of which nothing is retained is found once, whatever kind of request emptied it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from salun_core.data import resolve_forget
from salun_core.data.targets import ClassTarget, SamplesTarget, SubjectTarget
from salun_core.evaluation import Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.gate import decide, load_policy
from salun_core.tasks.classification.inputs import ClassifierInputs
from tests.support.lab import CLASS


@pytest.fixture(scope="module")
def inputs_of(lab):
    """Return the inputs of a request, on digits in which one writer wrote all threes and another half of the fours."""
    split = lab.data.split
    of = {
        label: [s for s in sorted(split.train) if lab.data.table.labels[lab.data.table.position[s]] == label]
        for label in (3, 4)
    }
    writers = dict.fromkeys(of[3], "ann") | dict.fromkeys(of[4][::2], "bob")
    table = lab.data.table.with_subjects(writers)
    original = SimpleNamespace(split=split, normalisation=lab.train.normalisation, check_images=lambda *_: None)

    def build(*targets):
        named = {
            "class": ClassTarget(class_name=str(CLASS)),
            "ann": SubjectTarget(subject_ref="ann"),
            "bob": SubjectTarget(subject_ref="bob"),
            "threes": SamplesTarget(dataset_digest=split.dataset_digest, ids=of[3]),
            "a four": SamplesTarget(dataset_digest=split.dataset_digest, ids=of[4][1:2]),
        }
        return ClassifierInputs(
            original, replace(lab.data, table=table), resolve_forget([named[name] for name in targets], table, split)
        )

    return build


@pytest.mark.parametrize(
    ("targets", "classes", "judged"),
    [
        (["class"], [3], {"class"}),
        (["ann"], [3], {"class"}),  # a person who is a class
        (["threes"], [3], {"class"}),
        (["bob"], [], {"subject"}),
        (["bob", "ann"], [3], {"class", "subject"}),
        (["class", "a four"], [3], {"class", "samples"}),
    ],
)
def test_classes_are_emptied_by_any_kind_of_request(inputs_of, targets, classes, judged):
    inputs = inputs_of(*targets)
    forgotten = inputs.forgotten()
    assert (inputs.emptied, forgotten.classes, forgotten.judged_kinds) == (tuple(classes), classes, judged)
    labels = inputs.forget.labels
    assert forgotten.in_classes == sum(int((labels == label).sum()) for label in classes)


def test_each_kind_of_a_batch_is_counted(inputs_of):
    """Ann is a class of her own, which the requests for a class do not name, and one four is someone else's."""
    inputs = inputs_of("ann", "a four")
    counted = {kind: (found.count, found.in_classes) for kind, found in inputs.forgotten().by_kind.items()}
    threes = inputs.forgotten().in_classes
    assert counted == {"samples": (1, 0), "subject": (threes, threes)}
    assert inputs.forgotten().judged_kinds == {"class", "samples"}
    assert inputs_of("ann").forgotten().by_kind == {}
    assert "of_kind" not in inputs_of("ann").forget_set.canonical().decode()


def test_a_person_who_is_a_class_is_judged_like_the_class(lab, inputs_of):
    """A model that never saw a class misclassifies all of it. The rules of single samples call that a mark."""
    inputs = inputs_of("ann")
    measured = Measured(before="a", after="b", dataset="c", split="d", forget_set="e")
    splits = Splits(inputs.forget, inputs.retain, lab.test)
    evidence = evaluate_classifier(lab.model, lab.unlearn("class"), splits, measured, inputs.forgotten())
    assert evidence.metrics["UA_class"].after > 0.95
    assert "UA_samples" not in evidence.metrics
    assert evidence.metrics["TA"].n == int((lab.test.labels != CLASS).sum())
    decision = decide(evidence, load_policy("classifier"))
    assert decision.passed, decision.summary


def test_evidence_that_counts_no_classes_is_judged_by_its_kinds_alone():
    plain = Forgotten(count=4, train_count=9, kinds=["subject"], classes=[1])
    assert plain.judged_kinds == {"subject"}
