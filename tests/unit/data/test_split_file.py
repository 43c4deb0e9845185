"""Splits as columns and as Parquet: the digests of their JSON, removals, and damaged files."""

import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salun_core.config import parse
from salun_core.data import rows as rows_module
from salun_core.data.rows import PARTS, open_rows
from salun_core.data.split import SPLIT, SplitManifest, read_split, require_split, stored_split
from salun_core.data.table import Table
from salun_core.data.targets import RandomTarget
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import IntegrityError, UsageError
from salun_core.registry.lookup import Version
from salun_core.registry.manifest import VersionManifest
from salun_core.storage.keys import blob_key
from tests.support.memory_store import MemoryStore

SET = "e" * 64
ODD = ['a"b', "back\\slash", "tab\t", "nul\0", "\x7f", "é", "\uffee", "\U0001f600", "z/1", ""]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of 64 rows and a megabyte at most, so that small splits have several, and small bombs are bombs.

    Their files count as large ones, whose groups do not stay in memory.
    """
    monkeypatch.setattr(rows_module, "GROUP_ROWS", 64)
    monkeypatch.setattr(rows_module, "EXPANDED_BYTES", 1_000_000)
    monkeypatch.setattr(rows_module, "_KEPT_BYTES", 0)


def of(names, seed=0):
    """Deal names out to the parts; a digest depends on its name only."""
    rng = random.Random(seed)
    found = {part: {} for part in PARTS}
    for name in names:
        found[rng.choice(["train", "train", *PARTS])][name] = sha256_bytes(name.encode())
    return found


def made(parts):
    return SplitManifest(dataset_digest=SET, **parts)


def digest_of(parts):
    """The digest as releases up to 0.1 computed it."""
    return digest_json({"format": "salun.split/v1", "dataset_digest": SET, **parts})


def written(split, folder):
    split.write(folder / SPLIT)
    return read_split(folder)


NAMES = [f"class{number % 7}/{number:05d}.png" for number in range(1000)]


@pytest.mark.parametrize("names", [[], ["one"], NAMES, ODD], ids=["none", "one", "a thousand", "odd"])
def test_a_file_has_what_was_written_and_the_digest_of_the_json(names, tmp_path):
    parts = of(names)
    split = made(parts)
    again = written(split, tmp_path)
    assert again == split
    assert again.digest == split.digest == digest_of(parts)
    for part in PARTS:
        rows = getattr(again, part)
        assert (list(rows), len(rows)) == (sorted(parts[part]), len(parts[part]))
        assert {name: rows[name] for name in rows} == dict(rows.items()) == parts[part]
        assert again.ids(part) == sorted(parts[part], key=parts[part].__getitem__)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), unique=True, max_size=150), st.data())
def test_any_split_and_what_is_left_of_it(names, data):
    parts = of(names)
    gone = data.draw(st.lists(st.sampled_from([*names, "absent", "\ud800"])))
    split = made(parts)
    left = split.without(gone)
    assert split.digest == digest_of(parts)
    kept = {name: digest for name, digest in parts["train"].items() if name not in gone}
    assert left.digest == digest_of({**parts, "train": kept})
    assert split.train.find(gone) == {name: parts["train"][name] for name in gone if name in parts["train"]}
    assert left.train.find(gone) == {}
    assert not any(name in left.train for name in gone)


def test_a_split_of_a_version_is_read_from_the_store(tmp_path):
    store, split = MemoryStore(), made(of(NAMES))
    split.write(tmp_path / SPLIT)
    data = (tmp_path / SPLIT).read_bytes()
    store.put_new(blob_key(sha256_bytes(data)), data)
    fields = {"line": "faces", "created_at": "2026-01-01T00:00:00+00:00", "method": "train"}
    files = {SPLIT: {"sha256": sha256_bytes(data), "size": len(data)}}
    assert stored_split(store, Version("v", VersionManifest(**fields, files=files))) == split
    with pytest.raises(UsageError, match="a model has no split"):
        require_split(["model.json"])


def test_no_trace_of_a_removed_sample_is_in_the_file_of_a_child(tmp_path):
    parts = of(NAMES)
    split = written(made(parts), tmp_path)
    gone = sorted(parts["train"])[::9]
    child = split.without(gone[::2]).without(gone)
    assert len(child.train) == len(parts["train"]) - len(gone)
    assert child.test == split.test
    again = written(child, tmp_path)  # over the file that the child is read from
    data = (tmp_path / SPLIT).read_bytes()
    assert not [name for name in gone if name in again.train or bytes.fromhex(parts["train"][name]) in data]
    kept = {name: digest for name, digest in parts["train"].items() if name not in gone}
    assert again.digest == digest_of({**parts, "train": kept})
    made({**parts, "train": kept}).write(tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == data  # the file does not depend on what was removed, or when


def test_a_split_stays_readable_when_its_file_is_gone_and_keeps_few_groups_in_memory(tmp_path, monkeypatch):
    parts = of(NAMES)
    split = written(made(parts), tmp_path)
    (tmp_path / SPLIT).unlink()
    reads = []
    whole = rows_module._as_group
    monkeypatch.setattr(rows_module, "_as_group", lambda table: reads.append(table.num_rows) or whole(table))
    near = sorted(parts["train"])[:5]
    assert list(split.train.find(near)) == near
    assert reads == [64]  # one group of sixteen
    assert split.digest == digest_of(parts)
    assert max(reads) == 64


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"train": {"a": SET}, "validation": {"a": SET}, "test": {}}, "a sample id is in two parts"),
        ({"train": {"a": "0" * 63}, "validation": {}, "test": {}}, "a row digest is not a SHA-256"),
        ({"train": {"a": "A" * 64}, "validation": {}, "test": {}}, "a row digest is not a SHA-256"),
        ({"train": {"\ud800": SET}, "validation": {}, "test": {}}, "a sample id is not text"),
    ],
)
def test_rows_with_faults_are_refused(parts, why):
    with pytest.raises(UsageError, match=why):
        parse(SplitManifest, {"dataset_digest": SET, **parts}, "a split")


GOOD = {"id": ["a", "b", "c"], "part": [0, 1, 2], "sha256": [bytes([number]) * 32 for number in range(3)]}
NOTE = {b"salun": json.dumps({"format": "salun.split/v2", "dataset_digest": SET}).encode()}


def parquet(columns=GOOD, note=NOTE, kinds=None, nullable=False, **options):
    """The bytes of a file, as somebody else could write it."""
    kinds = {"id": pyarrow.string(), "part": pyarrow.int8(), "sha256": pyarrow.binary(32), **(kinds or {})}
    schema = pyarrow.schema([pyarrow.field(name, kinds[name], nullable=nullable) for name in columns], note)
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays([pyarrow.array(columns[name], kinds[name]) for name in columns], schema=schema)
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def many(**columns):
    return {**{name: list(values) * 40 for name, values in GOOD.items()}, **columns}


def cut(data, place):
    return data[:place]


FAULTS = {
    "empty": (b"", "too small|cannot|0 bytes"),
    "not parquet": (b"{}" * 100, "magic bytes"),
    "cut": (parquet()[:-20], "magic bytes|corrupted"),
    "another schema": (parquet({"id": ["a"], "part": [0]}), "its columns are not those of a split"),
    "another type": (parquet(kinds={"part": pyarrow.int64()}), "its columns are not those of a split"),
    "another order": (parquet(dict(reversed(GOOD.items()))), "its columns are not those of a split"),
    "nulls": (parquet({**GOOD, "id": ["a", None, "c"]}, nullable=True), "its columns are not those of a split"),
    "no note": (parquet(note={}), "its metadata do not describe a split"),
    "a note that is not JSON": (parquet(note={b"salun": b"{"}), "its metadata do not describe a split"),
    "a later format": (parquet(note={b"salun": b'{"format": "x", "dataset_digest": "y"}'}), "its format is not"),
    "twice": (parquet({**GOOD, "id": ["a", "a", "c"]}), "a sample id occurs twice"),
    "twice, in two groups": (parquet({**GOOD, "id": ["a", "b", "b"]}, row_group_size=2), "a sample id occurs twice"),
    "not sorted": (parquet({**GOOD, "id": ["b", "a", "c"]}), "its sample ids are not sorted"),
    "groups not sorted": (parquet({**GOOD, "id": ["b", "c", "a"]}, row_group_size=2), "its sample ids are not sorted"),
    "a part that is none": (parquet({**GOOD, "part": [0, 3, 1]}), "a part is not one of train, validation, test"),
    "a negative part": (parquet({**GOOD, "part": [0, -1, 1]}), "a part is not one of train, validation, test"),
    "a large group": (parquet(many(id=[f"{number:04}" for number in range(120)])), "a group has 120 rows"),
    "one long id in all rows": (
        parquet({**GOOD, "id": [(c * 400_000) for c in "abc"]}, compression="zstd"),
        "expands too far",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused_in_one_line(fault, tmp_path):
    data, why = FAULTS[fault]
    (tmp_path / SPLIT).write_bytes(data)
    for source in (tmp_path / SPLIT, data):
        with pytest.raises(IntegrityError, match=why) as caught:
            open_rows(source, SPLIT)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_dictionary_that_expands_is_refused_before_it_does(monkeypatch):
    wide = {"id": ["x" * 50_000] * 60, "part": [0] * 60, "sha256": [bytes(32)] * 60}
    data = parquet(wide, compression="zstd", use_dictionary=["id"])  # in which all rows point to one value
    assert len(data) < 10_000
    monkeypatch.setattr(rows_module, "_as_group", lambda table: pytest.fail("the ids were copied"))
    with pytest.raises(IntegrityError, match="expands too far"):
        open_rows(data, SPLIT)


def test_random_damage_never_gives_another_split(tmp_path):
    split = made(of(NAMES[:200]))
    split.write(tmp_path / "good")
    good, rng = (tmp_path / "good").read_bytes(), random.Random(5)
    same = refused = 0
    for _ in range(150):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / SPLIT).write_bytes(data)
        try:
            same += read_split(tmp_path).digest == split.digest  # the card names the digest: another one is refused
        except IntegrityError:
            refused += 1
    assert refused > 20
    assert same > 0  # bytes that mean nothing, such as the name of the program that wrote it


def test_a_split_can_be_swapped_only_for_one_of_the_same_digest(tmp_path):
    split = written(made(of(NAMES)), tmp_path)
    others = [split.without([min(split.train)]), split.model_copy(update={"dataset_digest": "f" * 64})]
    for other in others:
        assert written(other, tmp_path).digest != split.digest


def test_a_table_has_the_digest_of_its_json(monkeypatch):
    monkeypatch.setattr("salun_core.data.table._PIECE", 7)
    rng = np.random.default_rng(0)
    names = [*NAMES[:20], *ODD, *ODD[:3]]
    table = Table(names, [n % 3 for n in range(len(names))], [rng.bytes(5) for _ in names], ["a", 'b"', "ç"])
    rows = sorted(zip(table.ids, table.row_digests, table.labels, strict=True))
    assert table.digest == digest_json({"classes": list(table.classes), "rows": [list(row) for row in rows]})
    assert Table([], [], [], ["a"]).digest == digest_json({"classes": ["a"], "rows": []})
    bad = Table(["\ud800"], [0], [b""], ["a"])
    with pytest.raises(IntegrityError, match="no canonical form"):
        _ = bad.digest


def test_a_random_share_takes_the_least_digests():
    target = RandomTarget(fraction=0.13, seed=7)
    names = sorted(NAMES, key=lambda name: sha256_bytes(f"7\0{name}".encode()))
    assert target.draw(NAMES) == sorted(names[:130])
    assert target.draw(made(of(NAMES)).train) == target.draw(list(of(NAMES)["train"]))
    assert target.draw([]) == []
