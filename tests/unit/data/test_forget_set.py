"""Concepts in forget sets; what classifiers forget is in test_split.py and test_redacted_targets.py."""

import json

import pytest

from salun_core.config import parse
from salun_core.data import DataSpec, ForgetSet, SplitManifest, resolve_forget
from salun_core.data.forget_set import require_partial
from salun_core.data.split import make_split
from salun_core.data.table import Table
from salun_core.data.targets import ClassTarget, ConceptTarget, RedactedTarget, SamplesTarget, SubjectTarget, redact
from salun_core.digest import sha256_bytes
from salun_core.errors import DataError, UsageError
from salun_core.tasks import TASKS, resolve_targets

ONE = ConceptTarget(prompts=["a parachute"], anchor_prompt="a bird")
TWO = ConceptTarget(prompts=["golf"], anchor_prompt="tennis", images=8, neighbours=["hockey"])
EMPTY = SplitManifest(dataset_digest="0" * 64, train={}, validation={}, test={})


@pytest.fixture(scope="module")
def data():
    table = Table(
        ids=[f"img-{number}" for number in range(40)],
        labels=[0, 1, 2, 3] * 10,
        payloads=[bytes([number]) for number in range(40)],
        classes=[f"class{number}" for number in range(4)],
    )
    return table, make_split(table, DataSpec(source="digits", test_fraction=0.3))


def test_the_digest_of_a_set_without_concepts_did_not_change():
    found = ForgetSet(dataset_digest="a" * 64, split_digest="b" * 64, ids=["x", "y"], kinds=["class"], classes=[3])
    assert found.digest == "0a696c436c70381e2f4a5edbcfff3d08c5cdbade6dd941a652864e3608cd2c37"
    assert "concepts" not in json.loads(found.canonical())
    assert found.samples == found.ids


def resolved(targets, table, split):
    """Resolve targets for a diffusion model."""
    return resolve_targets(TASKS["diffusion"], targets, table, split)


def test_each_concept_counts_as_one_pseudo_id(data):
    found = resolved([TWO, ONE, TWO], *data)
    assert found.ids == sorted([ONE.pseudo_id, TWO.pseudo_id])
    assert [concept.pseudo_id for concept in found.concepts] == found.ids
    assert (found.kinds, found.classes, found.samples) == (["concept"], [], [])
    assert sha256_bytes(found.canonical()) == found.digest
    assert parse(ForgetSet, json.loads(found.canonical()), "x") == found
    assert resolved([ONE, TWO], *data).digest == found.digest
    assert resolved([ONE], *data).digest != found.digest


def test_classes_and_concepts_can_be_combined(data):
    table, split = data
    alone = resolve_forget([ClassTarget(class_id=2)], table, split)
    assert resolved([ClassTarget(class_id="class2")], table, split) == alone
    found = resolved([ONE, ClassTarget(class_id=2)], table, split)
    assert (found.kinds, found.classes, found.samples) == (["class", "concept"], [2], alone.ids)
    assert found.ids == sorted([*alone.ids, ONE.pseudo_id])
    again = resolved([redact(ClassTarget(class_id=2), None), ONE], table, split)
    assert again == found
    assert split.without(found.ids) == split.without(alone.ids)
    split.without(found.ids).check(table)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (SamplesTarget(ids=["img-1"]), "diffusion model forgets classes and concepts"),
        (SubjectTarget(subject_ref="ann"), "diffusion model forgets classes and concepts"),
        (redact(SamplesTarget(ids=["img-1"]), "0" * 32), "diffusion model forgets classes and concepts"),
        (redact(ONE, "0" * 32), "file the request again"),
        (ClassTarget(class_id=9), "there is no class 9"),
    ],
)
def test_what_a_diffusion_model_cannot_forget_is_refused(data, target, why):
    with pytest.raises(UsageError, match=why):
        resolved([ONE, target], *data)


def test_a_model_without_data_forgets_concepts_only():
    found = resolved([ONE], None, EMPTY)
    assert (found.ids, found.split_digest) == ([ONE.pseudo_id], EMPTY.digest)
    require_partial(found, EMPTY)
    for target in (ClassTarget(class_id=1), RedactedTarget(of="class", count=1, class_id=1)):
        with pytest.raises(UsageError, match="came without training data"):
            resolved([ONE, target], None, EMPTY)
    with pytest.raises(UsageError, match="file the request again"):
        resolved([redact(ONE, None)], None, EMPTY)
    with pytest.raises(UsageError, match="a classifier cannot forget a concept"):
        resolve_targets(TASKS["classification"], [ONE], None, EMPTY)


def test_forget_and_retain_set_must_not_be_empty(data):
    table, split = data
    with pytest.raises(DataError, match="forget set is empty"):
        require_partial(resolved([], None, EMPTY), EMPTY)
    everything = [ClassTarget(class_id=number) for number in range(4)]
    with pytest.raises(DataError, match="the whole training data"):
        require_partial(resolved([*everything, ONE], table, split), split)
    require_partial(resolved([*everything[:3], ONE], table, split), split)
    require_partial(resolved([ONE, TWO], table, split), split)
    all_but_one = sorted(split.train)[1:]
    fields = {"dataset_digest": split.dataset_digest, "split_digest": split.digest, "kinds": ["class", "concept"]}
    require_partial(ForgetSet(**fields, ids=[*all_but_one, ONE.pseudo_id], concepts=[ONE]), split)


def test_a_set_without_the_pseudo_ids_of_its_concepts_is_refused():
    fields = {"dataset_digest": "a" * 64, "split_digest": "b" * 64, "kinds": ["concept"], "concepts": [ONE]}
    with pytest.raises(UsageError, match="lacks the pseudo id"):
        parse(ForgetSet, {**fields, "ids": ["x"]}, "x")
    assert ForgetSet(**fields, ids=[ONE.pseudo_id]).samples == []
