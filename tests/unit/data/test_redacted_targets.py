"""What is left of a target once its request is settled, and how the data find the samples again."""

import json

import pytest

from salun_core.data import DataSpec, resolve_forget
from salun_core.data.split import make_split
from salun_core.data.table import Table
from salun_core.data.targets import ClassTarget, ConceptTarget, SamplesTarget, SubjectTarget, parse_target, redact
from salun_core.errors import IntegrityError, UsageError

SALT = "0123456789abcdef" * 2
CONCEPT = ConceptTarget(prompts=["a", "b", "c"], anchor_prompt="d")


@pytest.fixture(scope="module")
def people():
    table = Table(
        ids=[f"img-{number}" for number in range(40)],
        labels=[0, 1, 2, 3] * 10,
        payloads=[bytes([number]) for number in range(40)],
        classes=[f"class{number}" for number in range(4)],
        subjects=["ann", "bob", None, "ann"] * 10,
    )
    return table, make_split(table, DataSpec(source="digits", test_fraction=0.3))


@pytest.mark.parametrize(
    "target",
    [
        SamplesTarget(ids=["img-7", "img-3", "img-3", "img-20"]),
        SubjectTarget(subject_ref="ann"),
        SubjectTarget(subject_ref="carl"),
        ClassTarget(class_id=2),
        ClassTarget(class_id="class2"),
    ],
)
def test_hashes_of_a_redacted_target_find_the_samples(people, target):
    before, left = resolve_forget([target], *people), redact(target, SALT)
    assert resolve_forget([left], *people) == before
    again = parse_target(json.loads(left.model_dump_json(exclude_none=True)), "batch")
    assert resolve_forget([again, target], *people).digest == before.digest
    assert (left.of, left.kind) == (target.kind, "redacted")


def test_a_redacted_target_is_bound_to_its_data_set_and_ignores_missing_samples(people):
    target = SamplesTarget(ids=["img-3", "gone"], dataset_digest=people[1].dataset_digest)
    found = resolve_forget([redact(target, SALT)], *people)
    assert found.ids == sorted({"img-3"} & people[1].train.keys())
    for other in (target, ClassTarget(class_id=2)):
        elsewhere = redact(other.model_copy(update={"dataset_digest": "0" * 64}), SALT)
        with pytest.raises(IntegrityError, match="data set of a forget target"):
            resolve_forget([elsewhere], *people)


@pytest.mark.parametrize(
    "left",
    [
        redact(SamplesTarget(ids=["img-3"]), None),
        redact(SubjectTarget(subject_ref="ann"), None),
        redact(SamplesTarget(manifest_uri="s3://b/k", sha256="0" * 64), SALT),
        redact(CONCEPT, SALT),
    ],
)
def test_a_target_without_hashes_cannot_be_resolved(people, left):
    with pytest.raises(UsageError, match="file the request again"):
        resolve_forget([left], *people)


def test_ids_of_a_manifest_are_hashed(people):
    manifest = SamplesTarget(manifest_uri="s3://b/k", sha256="0" * 64)
    left = redact(manifest, SALT, ids=["img-7", "img-3"])
    assert resolve_forget([left], *people) == resolve_forget([SamplesTarget(ids=["img-7", "img-3"])], *people)
    assert left.count == 0


def test_redacting_removes_names_and_cannot_be_undone():
    for target in (SamplesTarget(ids=["ann", "bob"]), SubjectTarget(subject_ref="ann")):
        left, other = redact(target, SALT), redact(target, SALT[::-1])
        assert "ann" not in left.model_dump_json()
        assert not set(left.hashes) & set(other.hashes)
        assert redact(left, SALT[::-1]) == left
        bare = redact(left, None)
        assert (bare.salt, bare.hashes, bare.count) == (None, [], left.count)
        assert redact(bare, SALT) == bare
    assert (redact(CONCEPT, SALT).count, redact(CONCEPT, SALT).hashes) == (3, [])
    subject, sample = redact(SubjectTarget(subject_ref="ann"), SALT), redact(SamplesTarget(ids=["ann"]), SALT)
    assert subject.hashes != sample.hashes
