"""Split manifests and forget sets."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salun_core.data import DataSpec, ForgetSet, SplitManifest, load_data, resolve_forget
from salun_core.data.forget_set import require_partial
from salun_core.data.split import make_split
from salun_core.data.table import Table
from salun_core.data.targets import parse_target, read_targets
from salun_core.errors import DataError, IntegrityError, UsageError


def table_of(labels, classes=None, seed=0, **more):
    rng = np.random.default_rng(seed)
    return Table(
        ids=[f"img-{index}" for index in range(len(labels))],
        labels=list(labels),
        payloads=[rng.bytes(20) for _ in labels],
        classes=[f"class{index}" for index in range(classes or max(labels) + 1)],
        subjects=more.pop("subjects", [None] * len(labels)),
        **more,
    )


def spec(**fields):
    return DataSpec(source="digits", **fields)


def by_class(table, ids):
    labels = [table.labels[table.position[sample]] for sample in ids]
    return [labels.count(index) for index in range(len(table.classes))]


@settings(max_examples=100)
@given(
    labels=st.lists(st.integers(0, 4), min_size=30, max_size=120),
    test=st.floats(0.1, 0.6),
    validation=st.floats(0.0, 0.5),
    seed=st.integers(0, 5),
)
def test_splits_are_disjoint_complete_stratified_and_repeatable(labels, test, validation, seed):
    table = table_of(labels, classes=5)
    settings_ = spec(test_fraction=test, validation_fraction=validation, split_seed=seed)
    try:
        split = make_split(table, settings_)
    except DataError:
        return
    parts = [split.train, split.validation, split.test]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == len(table)
    for sample, digest in {**split.train, **split.validation, **split.test}.items():
        assert digest == table.row_digests[table.position[sample]]
    for members, tested, held in zip(
        by_class(table, table.ids), by_class(table, split.test), by_class(table, split.validation), strict=True
    ):
        assert tested == round(test * members)
        assert held == round(validation * (members - tested))
    assert make_split(table, settings_) == split
    assert make_split(table, settings_).digest == split.digest
    assert [list(part) for part in parts] == [sorted(part) for part in parts]
    split.check(table)


def test_another_seed_gives_another_split():
    table = table_of([0, 1] * 50)
    assert make_split(table, spec(split_seed=1)).digest != make_split(table, spec(split_seed=2)).digest


def test_the_order_of_rows_does_not_change_the_data_set():
    table = table_of([0, 1, 2, 0])
    order = [2, 0, 3, 1]
    shuffled = Table(
        **{name: [getattr(table, name)[i] for i in order] for name in ("ids", "labels", "payloads")},
        classes=table.classes,
    )
    assert shuffled.digest == table.digest
    assert table_of([0, 1, 2, 1]).digest != table.digest
    assert table_of([0, 1, 2, 0], seed=1).digest != table.digest
    assert table_of([0, 1, 2, 0], classes=4).digest != table.digest


def test_limits_draw_by_class():
    table = table_of([0] * 60 + [1] * 30, parts=["train"] * 45 + ["test"] * 15 + ["train"] * 15 + ["test"] * 15)
    split = make_split(table, spec(train_limit=20, test_limit=10, validation_fraction=0.0))
    assert by_class(table, split.train) == [15, 5]
    assert by_class(table, split.test) == [5, 5]
    assert make_split(table, spec(train_limit=1000, validation_fraction=0.0)).train.keys() == {
        sample for sample, part in zip(table.ids, table.parts, strict=True) if part == "train"
    }


def test_empty_splits_are_refused():
    with pytest.raises(DataError, match="the split leaves no (test|training) data"):
        make_split(table_of([0, 1]), spec(test_fraction=0.1))
    with pytest.raises(DataError, match="the split leaves no (test|training) data"):
        make_split(table_of([0] * 4), spec(test_fraction=0.95))


def test_ids_must_be_unique():
    table = table_of([0, 1] * 10)
    twice = Table(["a"] * 20, table.labels, table.payloads, table.classes)
    with pytest.raises(UsageError, match="not unique"):
        make_split(twice, spec())


def test_the_digest_is_the_same_in_every_process():
    """Also with another seed of Python's hashes, which each test run draws anew."""
    digits = load_data(DataSpec(source="digits"))
    assert digits.split.digest == "4c72215747a60b11eadb3b58c2129546146d2d5578cec56fb0fd9283f1037bec"
    assert digits.table.digest == "5176cf701a8c009fe76e185341c78d226c3ee6b4c5ccd27ecf20b04f462d09f8"


def test_a_manifest_is_unchanged_after_a_round_trip(tmp_path):
    split = make_split(table_of([0, 1] * 20), spec())
    again = SplitManifest.model_validate_json(json.dumps(split.model_dump(mode="json")))
    assert again == split
    assert again.digest == split.digest


def test_any_part_of_a_split_is_a_random_sample():
    split = make_split(table_of([0] * 300 + [1] * 300), spec(test_fraction=0.2))
    ids = split.ids("train")
    assert sorted(ids) == sorted(split.train)
    assert [split.train[sample] for sample in ids] == sorted(split.train.values())
    first = ids[: len(ids) // 2]
    assert 0.35 < sum(int(sample.split("-")[1]) < 300 for sample in first) / len(first) < 0.65


def test_changed_and_missing_rows_are_caught():
    table = table_of([0, 1] * 20)
    split = make_split(table, spec())
    changed = list(table.payloads)
    changed[7] = changed[7][:-1] + bytes([changed[7][-1] ^ 1])
    with pytest.raises(IntegrityError, match="1 of 40 samples have other bytes"):
        split.check(Table(table.ids, table.labels, changed, table.classes))
    with pytest.raises(IntegrityError, match="3 of 40 samples are missing"):
        split.check(Table(table.ids[3:], table.labels[3:], table.payloads[3:], table.classes))
    more = Table([*table.ids, "new"], [*table.labels, 0], [*table.payloads, b"x"], table.classes)
    split.check(more)  # data that came later do not matter


def test_loading_checks_the_split():
    data = load_data(DataSpec(source="digits"))
    assert load_data(DataSpec(source="digits"), data.split).split is data.split
    rows = {**data.split.train, "absent": "0" * 64}
    other = SplitManifest(dataset_digest=data.split.dataset_digest, train=rows, validation={}, test={})
    with pytest.raises(IntegrityError, match="missing"):
        load_data(DataSpec(source="digits"), other)


SUBJECTS = ["ann", "bob", None, "ann"] * 10


@pytest.fixture(scope="module")
def people():
    table = table_of([0, 1, 2, 3] * 10, subjects=SUBJECTS)
    return table, make_split(table, spec(test_fraction=0.3))


def resolve(people, *targets):
    return resolve_forget([parse_target(target, "here") for target in targets], *people)


def test_samples_resolve_to_training_samples(people):
    table, split = people
    trained, tested = sorted(split.train)[:3], sorted(split.test)[:2]
    found = resolve(people, {"kind": "samples", "ids": [*tested, *reversed(trained), trained[0]]})
    assert found.ids == trained
    assert (found.kinds, found.classes) == (["samples"], [])
    assert (found.dataset_digest, found.split_digest) == (split.dataset_digest, split.digest)


@pytest.mark.parametrize("class_id", [2, "class2"])
def test_a_class_resolves_by_id_and_by_name(people, class_id):
    table, split = people
    found = resolve(people, {"kind": "class", "class_id": class_id, "dataset_digest": split.dataset_digest})
    assert found.ids == sorted(s for s in split.train if table.labels[table.position[s]] == 2)
    assert found.classes == [2]


def test_a_subject_resolves_through_its_column(people):
    table, split = people
    found = resolve(people, {"kind": "subject", "subject_ref": "ann"})
    assert found.ids == sorted(s for s in split.train if table.subjects[table.position[s]] == "ann")
    assert found.ids
    assert resolve(people, {"kind": "subject", "subject_ref": "None"}).ids == []
    with pytest.raises(UsageError, match="have no subjects"):
        resolve((table_of([0, 1] * 9), people[1]), {"kind": "subject", "subject_ref": "ann"})


def test_several_targets_give_their_union(people):
    targets = [
        {"kind": "class", "class_id": 1},
        {"kind": "subject", "subject_ref": "ann"},
        {"kind": "samples", "ids": sorted(people[1].train)[:2]},
        {"kind": "class", "class_id": "class0"},
    ]
    found = resolve(people, *targets)
    assert found.ids == sorted(set().union(*(resolve(people, target).ids for target in targets)))
    assert found.kinds == ["class", "samples", "subject"]
    assert found.classes == [0, 1]
    assert resolve(people, *reversed(targets)).digest == found.digest
    assert resolve(people, targets[0]).digest != found.digest
    assert ForgetSet.model_validate_json(found.model_dump_json()).digest == found.digest


@pytest.mark.parametrize(
    ("target", "error", "why"),
    [
        ({"kind": "samples", "ids": ["img-0", "img-99", "x"]}, UsageError, "2 of 3 ids.*number 2"),
        ({"kind": "class", "class_id": 4}, UsageError, "there is no class 4.*0 to 3"),
        ({"kind": "class", "class_id": -1}, UsageError, "there is no class -1"),
        ({"kind": "class", "class_id": "class9"}, UsageError, "did you mean 'class"),
        ({"kind": "class", "class_id": 0, "dataset_digest": "0" * 64}, IntegrityError, "data set of a forget target"),
        ({"kind": "samples", "ids": ["img-0"], "dataset_digest": "0" * 64}, IntegrityError, "data set of a forget"),
        ({"kind": "samples", "manifest_uri": "s3://b/k", "sha256": "0" * 64}, UsageError, "was not fetched"),
    ],
)
def test_targets_that_do_not_fit_the_data_are_refused(people, target, error, why):
    with pytest.raises(error, match=why):
        resolve(people, target)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ({"kind": "sample", "ids": ["a"]}, "did you mean 'samples'"),
        ({"ids": ["a"]}, "no `kind`"),
        ("class", "no `kind`"),
        ({"kind": 3}, "no `kind`"),
        ({"kind": "samples"}, "exactly one of"),
        ({"kind": "samples", "ids": []}, "ids"),
        ({"kind": "samples", "ids": ["a"], "manifest_uri": "s3://b/k", "sha256": "0"}, "exactly one of"),
        ({"kind": "samples", "manifest_uri": "s3://b/k"}, "give `sha256` and"),
        ({"kind": "samples", "ids": ["a"], "sha256": "0"}, "give `sha256` and"),
        ({"kind": "subject", "subject_ref": ""}, "subject_ref"),
        ({"kind": "class"}, "class_id"),
        ({"kind": "class", "class_id": 1, "klass": 2}, "unknown key"),
    ],
)
def test_invalid_targets_are_refused(target, why):
    with pytest.raises(UsageError, match=why):
        parse_target(target, "target.yaml")


def test_targets_are_read_from_files(tmp_path):
    one, many = tmp_path / "one.yaml", tmp_path / "many.json"
    one.write_text("kind: class\nclass_id: 3\n")
    many.write_text(json.dumps([{"kind": "class", "class_id": 3}, {"kind": "samples", "ids": ["a"]}]))
    assert [target.kind for target in read_targets(one)] == ["class"]
    assert [target.kind for target in read_targets(many)] == ["class", "samples"]
    with pytest.raises(UsageError, match="cannot read"):
        read_targets(tmp_path / "absent.yaml")


def test_forgetting_nothing_or_everything_is_refused(people):
    table, split = people
    with pytest.raises(DataError, match="forget set is empty"):
        require_partial(resolve(people, {"kind": "samples", "ids": sorted(split.test)[:2]}), split)
    with pytest.raises(DataError, match="whole training data"):
        require_partial(resolve(people, {"kind": "samples", "ids": list(table.ids)}), split)
    require_partial(resolve(people, {"kind": "samples", "ids": sorted(split.train)[:2]}), split)


def test_a_forget_set_splits_the_training_images():
    data = load_data(DataSpec(source="digits"))
    train = data.images("train")
    found = resolve_forget([parse_target({"kind": "class", "class_id": 7}, "x")], data.table, data.split)
    forget, retain = data.forget(found), data.retain(found)
    assert set(forget.labels.tolist()) == {7}
    assert 7 not in retain.labels.tolist()
    assert {*forget.ids, *retain.ids} == set(train.ids)
    assert list(forget.ids) == [sample for sample in train.ids if sample in set(found.ids)]
    with pytest.raises(IntegrityError, match="split of the forget set"):
        data.forget(found.model_copy(update={"split_digest": "0" * 64}))
    strange = ForgetSet(dataset_digest=found.dataset_digest, split_digest=found.split_digest, ids=["x"], kinds=[])
    with pytest.raises(DataError, match="outside the training split"):
        data.forget(strange)
