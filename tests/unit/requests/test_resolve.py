import json

import pytest

from salun_core.config import parse
from salun_core.data import DataSpec, ForgetSet, load_data, resolve_forget
from salun_core.data.split import SplitManifest
from salun_core.data.targets import ClassTarget, ConceptTarget, SamplesTarget, SubjectTarget
from salun_core.digest import sha256_bytes
from salun_core.errors import UsageError
from salun_core.requests.resolve import TableResolver
from salun_core.requests.schema import DeletionRequest
from salun_core.tasks import TASKS

CONCEPT = ConceptTarget(prompts=["a parachute"], anchor_prompt="a bird")
EMPTY = SplitManifest(dataset_digest="0" * 64, train={}, validation={}, test={})


def request(target):
    times = {"received_at": "2026-01-31T09:00:00+00:00", "due_at": "2026-02-28T09:00:00+00:00"}
    return DeletionRequest(id="r-1", model_line="sd", target=target, **times)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataSpec(source="digits"))


def test_a_concept_resolves_to_one_pseudo_id(digits):
    resolver = TableResolver(digits.table, digits.split, TASKS["diffusion"])
    found = resolver.resolve(request(CONCEPT))
    assert (found.ids, found.named, found.samples) == ([CONCEPT.pseudo_id], 1, frozenset())
    assert found.concepts == {CONCEPT.pseudo_id}
    assert found.digest == resolve_forget([CONCEPT], digits.table, digits.split).digest
    of_class = resolver.resolve(request(ClassTarget(class_id=7)))
    assert of_class.samples == set(of_class.ids)
    assert of_class.concepts == frozenset()
    assert resolver.train_count == len(digits.split.train)


def test_the_frozen_bytes_have_the_digest_of_the_forget_set(digits):
    resolver = TableResolver(digits.table, digits.split, TASKS["diffusion"])
    for targets in ([CONCEPT], [ClassTarget(class_id=7)], [CONCEPT, ClassTarget(class_id=7)]):
        frozen = resolver.freeze_forget_set([request(target) for target in targets])
        document = parse(ForgetSet, json.loads(frozen), "frozen")
        assert document == resolve_forget(targets, digits.table, digits.split)
        assert sha256_bytes(frozen) == document.digest


@pytest.mark.parametrize("target", [SamplesTarget(ids=["unknown"]), SubjectTarget(subject_ref="ann")])
def test_single_samples_of_a_diffusion_model_are_refused(digits, target):
    with pytest.raises(UsageError, match="classes and concepts"):
        TableResolver(digits.table, digits.split, TASKS["diffusion"]).resolve(request(target))


def test_a_classifier_resolves_samples_and_no_concepts(digits):
    resolver = TableResolver(digits.table, digits.split, TASKS["classification"])
    assert resolver.resolve(request(SamplesTarget(ids=["unknown"]))).ids == []
    with pytest.raises(UsageError, match="a classifier cannot forget a concept"):
        resolver.resolve(request(CONCEPT))


def test_a_line_without_data_resolves_concepts_only():
    resolver = TableResolver(None, EMPTY, TASKS["diffusion"])
    assert resolver.train_count == 0
    assert resolver.resolve(request(CONCEPT)).ids == [CONCEPT.pseudo_id]
    with pytest.raises(UsageError, match="came without training data"):
        resolver.resolve(request(ClassTarget(class_id=1)))
