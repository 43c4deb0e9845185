"""A class is found by name before index, and a value that may mean two classes is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.data import DataSpec, resolve_forget
from salun_core.data.classes import find_class
from salun_core.data.split import make_split
from salun_core.data.table import Table
from salun_core.data.targets import ClassTarget, parse_target, redact
from salun_core.errors import AmbiguousTargetError, UsageError

FOLDERS = ["1", "2", "3"]
PADDED = ["00001", "00002", "00003"]
PETS = ["cat", "dog", "mouse"]


@pytest.mark.parametrize(
    ("classes", "target", "index"),
    [
        (FOLDERS, {"class_name": "1"}, 0),
        (FOLDERS, {"class_index": 1}, 1),
        (FOLDERS, {"class_id": 3}, 2),  # no class has the index 3
        (FOLDERS, {"class_id": "3"}, 2),
        (FOLDERS, {"class_id": 0}, 0),  # no class has the name 0
        (PADDED, {"class_id": "00001"}, 0),
        (PETS, {"class_id": 1}, 1),
        (PETS, {"class_id": "1"}, 1),
        (PETS, {"class_id": "dog"}, 1),
        (["0", "1", "2"], {"class_id": 1}, 1),
        (["0", "1", "2"], {"class_id": "1"}, 1),
    ],
)
def test_a_class_is_found_by_name_and_then_by_index(classes, target, index):
    assert find_class(ClassTarget(**target), classes) == index


@pytest.mark.parametrize(
    ("classes", "wanted"), [(FOLDERS, 1), (FOLDERS, "1"), (PADDED, 1), (PADDED, 2), (["1", "x", "01"], 1)]
)
def test_a_value_that_may_mean_two_classes_is_refused(classes, wanted):
    with pytest.raises(AmbiguousTargetError, match="is ambiguous.*--class-name.*--class-index") as refused:
        find_class(ClassTarget(class_id=wanted), classes)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ({"class_id": 99}, "there is no class 99"),
        ({"class_id": "99"}, "there is no class 99"),
        ({"class_index": 3}, "there is no class 3"),
        ({"class_name": "1"}, "unknown class '1'"),
        ({"class_name": "Cat"}, "upper and lower case count"),
        ({"class_id": "mous"}, "did you mean 'mouse'"),
    ],
)
def test_a_class_that_does_not_exist(target, why):
    with pytest.raises(UsageError, match=why):
        find_class(ClassTarget(**target), PETS)


@pytest.mark.parametrize("fields", [{}, {"class_id": 1, "class_name": "1"}, {"class_name": "a", "class_index": 0}])
def test_a_target_names_its_class_in_one_way(fields):
    with pytest.raises(UsageError, match="exactly one of `class_id`, `class_name` and `class_index`"):
        parse_target({"kind": "class", **fields}, "x")


@given(st.lists(st.sampled_from(["0", "1", "2", "3", "00", "01", "a", "b"]), min_size=1, unique=True), st.data())
def test_no_value_erases_another_class_than_the_one_of_its_name(classes, data):
    name = data.draw(st.sampled_from(classes))
    for wanted in {name, int(name) if name.isdecimal() else name}:
        try:
            found = find_class(ClassTarget(class_id=wanted), classes)
        except AmbiguousTargetError:
            continue
        assert classes[found] == name
    assert classes[find_class(ClassTarget(class_name=name), classes)] == name


def test_a_redacted_class_keeps_the_way_in_which_it_was_named():
    table = Table(
        ids=[f"img-{number}" for number in range(30)],
        labels=[0, 1, 2] * 10,
        payloads=[bytes([number]) for number in range(30)],
        classes=FOLDERS,
    )
    data = table, make_split(table, DataSpec(source="digits", test_fraction=0.3))
    for target in (ClassTarget(class_name="1"), ClassTarget(class_index=1)):
        assert resolve_forget([redact(target, "0" * 32)], *data) == resolve_forget([target], *data)
    with pytest.raises(AmbiguousTargetError):
        resolve_forget([redact(ClassTarget(class_id=1), "0" * 32)], *data)


def test_the_stored_form_of_an_old_target_did_not_change():
    stored = ClassTarget(class_id=3).model_dump(mode="json", exclude_none=True)
    assert stored == {"kind": "class", "class_id": 3}
    left = redact(ClassTarget(class_id="cat"), "0" * 32).model_dump(mode="json", exclude_none=True)
    assert left == {"kind": "redacted", "of": "class", "count": 1, "class_id": "cat", "hashes": []}
