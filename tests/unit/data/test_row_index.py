"""The row index of a split: only the rows that are needed are read, and whatever changed is found."""

import errno
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from salun_core.data import DataSpec, by_index, load_data, loading, resolve_forget, stored
from salun_core.data.index import INDEXED_ROWS, WHERE, Layout, layout_of
from salun_core.data.split import SPLIT, SplitManifest, read_split
from salun_core.data.stored import CACHE_VARIABLE, BlockCache, StoredFile
from salun_core.data.stream import StreamedImages
from salun_core.data.table import Encoded, Origin, Shard, Table, Texts
from salun_core.data.targets import ClassTarget, SamplesTarget, SubjectTarget
from salun_core.errors import DataError, IntegrityError, StoreError, UsageError
from salun_core.requests.resolve import TableResolver
from salun_core.retention.purge import PurgeReport
from salun_core.retention.rules import DeletionPlan
from salun_core.steps import purge
from salun_core.tasks import task_named
from tests.support.memory_store import MemoryFiles

VARIABLE = "SALUN_IMAGE_MEMORY"
ROWS, SIZE = 60, 8 * 8 * 3 + 54  # bitmaps have the same size each, so that a changed file can keep its own


def bitmaps(seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(ROWS):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "BMP")
        found.append(file.getvalue())
    return found


def write_parquet(path, rows, first=0, paths=False):
    images = [{"bytes": row, "path": f"img-{first + i}.bmp"} if paths else {"bytes": row} for i, row in enumerate(rows)]
    labels = [(first + i) % 3 for i in range(len(rows))]
    who = [f"person-{(first + i) % 7}" for i in range(len(rows))]
    table = pyarrow.table({"image": images, "label": labels, "who": who})
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="none")


def parquet(folder, paths=False):
    rows = bitmaps()
    write_parquet(folder / "part-0.parquet", rows[:30], 0, paths)
    write_parquet(folder / "part-1.parquet", rows[30:], 30, paths)


def named_parquet(folder):
    parquet(folder, paths=True)


def own_split(folder):
    rows = bitmaps()
    write_parquet(folder / "train.parquet", rows[:40])
    write_parquet(folder / "test.parquet", rows[40:], 40)


def saved(folder):
    table = pyarrow.table({"image": bitmaps(), "label": [i % 3 for i in range(ROWS)]})
    folder.mkdir()
    with pyarrow.OSFile(str(folder / "data-0.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=16)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")


def tar(folder):
    folder.mkdir()
    for number, some in enumerate((bitmaps()[:35], bitmaps()[35:])):
        with tarfile.open(folder / f"{number}.tar", "w") as file:
            for index, row in enumerate(some):
                for name, data in ((f"s{number}-{index}.bmp", row), (f"s{number}-{index}.cls", b"%d" % (index % 3))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))


def images(folder):
    for index, row in enumerate(bitmaps()):
        path = folder / "abc"[index % 3] / f"{index}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row)


def parts(folder):
    images(folder / "train")
    images(folder / "val")


LAYOUTS = [parquet, named_parquet, own_split, saved, tar, images, parts]


def trained(monkeypatch, folder, spec):
    """Return the data as they are read whole, with the split as a later step reads it."""
    monkeypatch.setenv(VARIABLE, "0")
    whole = load_data(spec)
    monkeypatch.delenv(VARIABLE)
    whole.split.write(folder / SPLIT)
    return whole, read_split(folder)


def forbid_reading_all(monkeypatch):
    def refused(*_):
        raise AssertionError("the data were read as a whole")

    monkeypatch.setattr(loading, "read_table", refused)


@pytest.fixture
def two(monkeypatch, tmp_path):
    """A spec of two Parquet files, the data, and their split."""
    parquet(tmp_path / "data")
    spec = DataSpec(source=str(tmp_path / "data"), subject_column="who")
    return spec, *trained(monkeypatch, tmp_path, spec)


@pytest.mark.parametrize("write", LAYOUTS)
def test_an_index_gives_the_same_data_without_reading_them_all(monkeypatch, tmp_path, write):
    write(tmp_path / "data")
    spec = DataSpec(source=str(tmp_path / "data"), augment="crop-flip")
    whole, split = trained(monkeypatch, tmp_path, spec)
    assert split.digest == whole.split.digest == load_data(spec).split.digest
    forbid_reading_all(monkeypatch)
    monkeypatch.setattr(Encoded, "read", lambda *_: pytest.fail("an image was read"))
    data = load_data(spec, split)
    monkeypatch.undo()
    assert list(data.table.ids) == list(whole.table.ids)
    assert list(data.table.labels) == list(whole.table.labels)
    assert list(data.table.classes) == list(whole.table.classes)
    assert np.array_equal(data.table.row_hashes, whole.table.row_hashes)
    assert data.table.digest == split.dataset_digest
    for name in ("train", "validation", "test"):
        ours, theirs = data.images(name), whole.images(name)
        assert list(ours.ids) == list(theirs.ids)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.pixels(range(len(ours))), theirs.pixels(range(len(theirs))))
        assert ours.normalisation == theirs.normalisation
    monkeypatch.setenv(VARIABLE, "0")
    streamed = load_data(spec, split).images("train")
    assert isinstance(streamed, StreamedImages)
    assert torch.equal(streamed.pixels([5, 1]), data.images("train").pixels([5, 1]))


def test_only_the_forget_set_is_read(monkeypatch, two):
    spec, whole, split = two
    data, rows = load_data(spec, split), []
    read = by_index.read_rows
    monkeypatch.setattr(by_index, "read_rows", lambda *given: rows.extend(given[3]) or read(*given))
    data = load_data(spec, split)
    some = split.ids("train")[3:9]
    found = resolve_forget([SamplesTarget(ids=sorted(some))], data.table, split)
    images = data.forget(found)
    assert (list(images.ids), len(rows) - 1) == (some, len(some))  # and the first one, for the number of channels
    assert torch.equal(images.images, whole.pixels(some))
    assert {*images.ids, *data.retain(found).ids} == set(split.train)


def test_targets_resolve_as_against_the_whole_data(two):
    spec, whole, split = two
    data = load_data(spec, split)
    targets = [
        [ClassTarget(class_index=1)],
        [SubjectTarget(subject_ref="person-3")],
        [SamplesTarget(ids=["000007", "000031"]), ClassTarget(class_index=0)],
    ]
    for some in targets:
        assert resolve_forget(some, data.table, split) == resolve_forget(some, whole.table, split)
    with pytest.raises(UsageError, match="1 of 2 ids are not in the data"):
        resolve_forget([SamplesTarget(ids=["000007", "000060"])], data.table, split)


@pytest.mark.parametrize("write", [parquet, named_parquet, tar])
def test_a_child_has_no_trace_of_what_was_forgotten_and_still_knows_that_it_was_in_the_data(
    monkeypatch, tmp_path, write
):
    write(tmp_path / "data")
    spec = DataSpec(source=str(tmp_path / "data"), subject_column="who" if write is not tar else None)
    whole, split = trained(monkeypatch, tmp_path, spec)
    gone = split.ids("train")[:2]
    split.without(gone).write(tmp_path / SPLIT)
    child = read_split(tmp_path)
    data = load_data(spec, child)
    names = pyarrow.parquet.read_table(tmp_path / SPLIT).column("id").to_pylist()
    assert not set(gone) & {*names, *data.table.ids}
    assert len(data.table) == ROWS - 2
    assert torch.equal(data.images("train").images, whole.pixels(child.ids("train")))
    resolver = TableResolver(data.table, child, task_named("classification"))
    assert resolver.look_up(SamplesTarget(ids=[*gone, "a typing error"])) == (set(gone), 1)
    assert resolve_forget([SamplesTarget(ids=gone)], data.table, child).ids == []
    if spec.subject_column:
        person = next(iter(whole.table.subjects))
        of = [name for name, who in zip(whole.table.ids, whole.table.subjects, strict=True) if who == person]
        data = load_data(spec, child.without(set(child.train) & set(of)).model_copy())
        resolver = TableResolver(data.table, data.split, task_named("classification"))
        assert resolver.look_up(SubjectTarget(subject_ref=person))[1] == 0
        assert resolver.look_up(SubjectTarget(subject_ref="nobody"))[1] == 1


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_files_that_are_missing_or_have_another_size_are_refused_at_once(tmp_path, two):
    spec, _, split = two
    part = tmp_path / "data" / "part-1.parquet"
    moved = part.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"^part-1\.parquet is missing: the row index of the model names it"):
        load_data(spec, split)
    moved.rename(part)
    part.write_bytes(part.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"^part-1\.parquet has another size: it has \d+ bytes, and had \d+ when"):
        load_data(spec, split)


def test_a_row_that_changed_is_found_when_it_is_read(tmp_path, two):
    spec, whole, split = two
    part = tmp_path / "data" / "part-1.parquet"
    image = whole.table.payloads[35]
    flipped(part, part.read_bytes().index(image) + 60)
    data = load_data(spec, split)
    assert torch.equal(data.pixels(["000034"]), whole.pixels(["000034"]))
    with pytest.raises(IntegrityError, match=r"^image 000035 \(row 5 of part-1\.parquet\) changed"):
        data.pixels(["000035"])


def test_rows_that_moved_between_files_are_found(tmp_path, two):
    spec, _, split = two
    one, other = tmp_path / "data" / "part-0.parquet", tmp_path / "data" / "part-1.parquet"
    assert one.stat().st_size == other.stat().st_size
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(IntegrityError, match=r"^image 000000 \(row 0 of part-0\.parquet\) changed"):
        load_data(spec, split).pixels(["000000"])


def test_data_that_are_packed_in_another_way_are_read_as_a_whole(tmp_path, two):
    spec, whole, split = two
    before = whole.pixels(["000044"])
    shutil.rmtree(tmp_path / "data")
    write_parquet(tmp_path / "data" / "all.parquet", bitmaps())
    data = load_data(spec, split)
    assert not isinstance(data.table.ids, Texts)
    assert torch.equal(data.pixels(["000044"]), before)


@pytest.mark.parametrize("change", [{"label_column": "who"}, {"subject_column": None}, {"classes": ["a", "b", "c"]}])
def test_an_index_of_other_columns_is_not_used(monkeypatch, two, change):
    spec, _, split = two
    forbid_reading_all(monkeypatch)
    with pytest.raises(AssertionError, match="as a whole"):
        load_data(spec.model_copy(update=change), split)


def test_one_changed_bit_of_a_split_never_gives_another_table(tmp_path, two):
    spec, _, split = two
    path, good = tmp_path / SPLIT, (tmp_path / SPLIT).read_bytes()
    expected = load_data(spec, split)
    for place in range(4, len(good), 97):
        flipped(path, place)
        try:
            found = read_split(tmp_path)
            table = load_data(spec, found).table if found.digest == split.digest else None
        except (IntegrityError, DataError):
            table = None
        if table is not None and isinstance(table.ids, Texts):
            assert list(table.ids) == list(expected.table.ids)
            assert list(table.labels) == list(expected.table.labels)
            assert list(table.subjects) == list(expected.table.subjects)
        path.write_bytes(good)


def rewritten(path, **columns):
    """Write a split again with other columns."""
    table = pyarrow.parquet.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pyarrow.array(values, table.schema.field(name).type))
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"shard": [2] * ROWS}, "in a shard that it does not name"),
        ({"label": [3] * ROWS}, "a label that is not a class"),
        ({"place": [30] * ROWS}, "behind the end of its shard"),
        ({"place": [-1] * ROWS}, "behind the end of its shard"),
        ({"id": ["000000", "000000", *(f"{i:06d}" for i in range(2, ROWS))]}, "a sample id occurs twice"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(tmp_path, two, columns, why):
    rewritten(tmp_path / SPLIT, **columns)
    with pytest.raises(IntegrityError, match=f"is damaged: .*{why}"):
        read_split(tmp_path)


def test_an_index_may_not_lead_out_of_the_data(monkeypatch, tmp_path):
    images(tmp_path / "data")
    spec = DataSpec(source=str(tmp_path / "data"))
    whole, split = trained(monkeypatch, tmp_path, spec)
    (tmp_path / "secret.bmp").write_bytes(whole.table.payloads[0])
    ids = sorted(whole.table.ids)
    split.write(tmp_path / "good")
    rewritten(tmp_path / SPLIT, id=["../secret.bmp", *ids[1:]])
    with pytest.raises(DataError, match="an id leads out of the data"):
        load_data(spec, read_split(tmp_path)).pixels(["../secret.bmp"])
    (tmp_path / "data" / ids[1]).unlink()
    (tmp_path / "data" / ids[1]).symlink_to(tmp_path / "secret.bmp")
    (tmp_path / "good").replace(tmp_path / SPLIT)
    split = read_split(tmp_path)
    with pytest.raises(DataError, match="leads out of the data: it is a link"):
        load_data(spec, split).pixels([ids[1]])
    document = split.layout.model_dump()
    document["shards"][0]["name"] = "../.."
    with pytest.raises(ValueError, match="leads out of the data"):
        Layout.model_validate(document)


def table_of(rows, origin=None):
    shard = Shard("x", rows, lambda places: iter(()), origin)
    return Table([str(i) for i in range(rows)], [0] * rows, [b""] * rows, ["a"], stored=Encoded([shard]))


def test_small_data_in_memory_have_no_index(tmp_path):
    parquet(tmp_path / "data")
    spec = DataSpec(source=str(tmp_path / "data"))
    split = load_data(spec).split
    assert split.layout is None
    split.write(tmp_path / SPLIT)
    assert pyarrow.parquet.read_schema(tmp_path / SPLIT).names == ["id", "part", "sha256"]
    origin = Origin("parquet", Path("x"))
    assert layout_of(table_of(INDEXED_ROWS - 1, origin=origin), spec) is None
    assert layout_of(table_of(INDEXED_ROWS, origin=origin), spec).rows == INDEXED_ROWS
    assert layout_of(table_of(INDEXED_ROWS), spec) is None  # they are in no file


def test_a_split_of_the_same_rows_is_the_same_file(tmp_path, two):
    _, _, split = two
    gone = split.ids("train")[:3]
    split.without(gone).write(tmp_path / "one")
    split.without(gone[:1]).without(gone[1:]).write(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert set(WHERE.names) < set(pyarrow.parquet.read_schema(tmp_path / "one").names)
    assert SplitManifest.model_validate(split.model_dump()).digest == split.digest


@pytest.fixture
def ranges(monkeypatch):
    """The ranges that were read from a store: (key, start, length)."""
    found, read = [], StoredFile.read
    monkeypatch.setattr(
        StoredFile,
        "read",
        lambda file, start, length: found.append((file.key, start, length)) or read(file, start, length),
    )
    return found


def uploaded(store, folder):
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.upload(path, path.relative_to(folder.parent).as_posix())


@pytest.fixture
def bucket(monkeypatch):
    """A store in memory, which is the bucket of all addresses."""
    found = MemoryFiles()
    monkeypatch.setattr(stored, "open_store", lambda _: found)
    return found


@pytest.mark.parametrize("write", [named_parquet, saved, tar, images])
def test_rows_are_read_from_a_store_by_ranges(tmp_path, bucket, ranges, write):
    write(tmp_path / "data")
    uploaded(bucket, tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        whole, split = trained(patch, tmp_path, DataSpec(source="s3://bucket/data"))
        forbid_reading_all(patch)
        data = load_data(whole.spec, split)
    assert not ranges
    some = [name for name in split.ids("train") if data.table.rows_of([name])[0] < 10][:3]
    assert torch.equal(data.pixels(some), whole.pixels(some))
    assert len({key for key, _, _ in ranges}) == (0 if write is images else 1)  # images are read whole, by their names
    if write is tar:
        assert [length for _, _, length in ranges] == [SIZE] * 3
    elif write is named_parquet:  # the images of one group of ten rows, and the footer
        starts = [start for _, start, length in ranges if length < 10 * (SIZE + 99)]
        assert len(ranges) - len(starts) == 1
    assert torch.equal(data.images("train").pixels([2, 1]), whole.pixels([split.ids("train")[i] for i in (2, 1)]))


def test_reads_that_follow_each_other_share_requests(bucket, ranges):
    content = bytes(range(256)) * 4000
    bucket.put_new("data/one", content)
    file = stored.stored_files("s3://bucket/data")["one"]
    with file.open() as opened:
        for start in range(0, 1_000_000, 1_000):
            opened.seek(start)
            assert opened.read(900) == content[start : start + 900]
    needed, read = 900_000, sum(length for _, _, length in ranges)
    assert len(ranges) < 30
    assert read < 2.3 * needed
    assert [length for _, _, length in ranges][:4] == [900] * 4

    del ranges[:]
    far = [800_000, 0, 400_000, 100_000, 700_000, 200_000]
    with file.open() as opened:
        for start in far:
            opened.seek(start)
            assert opened.read(900) == content[start : start + 900]
        opened.seek(len(content) - 10)
        assert opened.read() == content[-10:]
        assert opened.read() == b""
    assert [(start, length) for _, start, length in ranges] == [
        *((start, 900) for start in far),
        (len(content) - 10, 10),
    ]


@pytest.mark.s3
def test_a_single_object_is_a_source(monkeypatch, tmp_path, store):
    parquet(tmp_path / "data")
    uploaded(store, tmp_path / "data")
    whole, split = trained(monkeypatch, tmp_path, DataSpec(source=f"{store.uri}/data/part-0.parquet"))
    forbid_reading_all(monkeypatch)
    assert torch.equal(load_data(whole.spec, split).pixels(["000003"]), whole.pixels(["000003"]))


@pytest.mark.s3
def test_an_object_that_is_replaced_during_a_run_is_an_error(monkeypatch, tmp_path, store):
    parquet(tmp_path / "data")
    uploaded(store, tmp_path / "data")
    spec = DataSpec(source=f"{store.uri}/data")
    _, split = trained(monkeypatch, tmp_path, spec)
    data = load_data(spec, split)
    store.upload(tmp_path / "data" / "part-1.parquet", "data/part-0.parquet")
    assert len(data.pixels(["000035"])) == 1
    with pytest.raises(DataError, match=r"^part-0\.parquet changed: it was replaced or deleted in the store"):
        data.pixels(["000005"])
    with pytest.raises(IntegrityError, match=r"^image 000005 \(row 5 of part-0\.parquet\) changed"):
        load_data(spec, split).pixels(["000005"])
    store.delete("data/part-1.parquet")
    with pytest.raises(DataError, match=r"^part-1\.parquet is missing"):
        load_data(spec, split)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def blocks(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("write", [parquet, images])
def test_a_cache_saves_the_second_reading(monkeypatch, tmp_path, bucket, cache, write):
    write(tmp_path / "data")
    uploaded(bucket, tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        whole, split = trained(patch, tmp_path, DataSpec(source="s3://bucket/data"))
    some = split.ids("train")[:4]
    assert torch.equal(load_data(whole.spec, split).pixels(some), whole.pixels(some))
    assert blocks(cache)
    assert {path.stat().st_mode & 0o777 for path in blocks(cache)} == {0o600}  # images of people, in clear
    assert {path.stat().st_mode & 0o777 for path in (cache, *(path.parent for path in blocks(cache)))} == {0o700}
    for method in ("read_range", "read_start"):
        monkeypatch.setattr(bucket, method, lambda *_: pytest.fail("the store was read"))
    assert torch.equal(load_data(whole.spec, split).pixels(some), whole.pixels(some))


def test_a_cache_is_checked_and_forgets_after_twelve_hours(tmp_path):
    now = [1_000_000.0]
    cache, read = BlockCache(tmp_path, lambda: now[0]), []

    def fetch():
        read.append(now[0])
        return b"some images"

    def reads():
        before = len(read)
        assert cache.read("a block", fetch) == b"some images"
        return len(read) - before

    assert (reads(), reads()) == (1, 0)
    flipped(blocks(tmp_path)[0], 40)
    assert (reads(), reads()) == (1, 0)  # a damaged block is replaced
    begun = now[0] // (4 * 3600) * 4 * 3600
    now[0] = begun + 12 * 3600 - 1
    assert reads() == 0
    assert cache.expire() == 0
    now[0] += 1
    assert cache.expire() == 1
    assert not blocks(tmp_path)
    assert reads() == 1
    (tmp_path / "somebody else's").mkdir()
    assert cache.expire(keep=0) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["somebody else's"]
    shutil.rmtree(tmp_path)
    assert (reads(), reads()) == (1, 1)  # nothing can be kept, and everything can be read


def denied(path, **_):
    """What the system answers a user who may not delete a file; root may delete any."""
    raise PermissionError(errno.EACCES, "Permission denied", path)


def test_a_purge_that_cannot_empty_the_cache_fails(monkeypatch, cache):
    cache.mkdir()
    BlockCache(cache).read("an image of somebody", lambda: b"pixels")
    monkeypatch.setattr(os, "unlink", denied)
    assert BlockCache(cache).expire() == 0
    monkeypatch.setattr(purge, "open_store", lambda _: None)
    purged = []
    monkeypatch.setattr(purge, "purge", lambda *_, **__: purged.append("the store"))
    with pytest.raises(StoreError, match=r"^the cache of the data cannot be emptied: .*: Permission denied"):
        purge.purge_store("s3://bucket/store")
    assert purged == ["the store"]


def test_a_block_that_another_process_deletes_or_writes_does_not_stop_a_purge(monkeypatch, cache):
    cache.mkdir()
    BlockCache(cache).read("an image of somebody", lambda: b"pixels")
    (folder,) = cache.iterdir()
    unlink, removed = os.unlink, []

    def beside(path, *args, **options):
        unlink(path, *args, **options)
        removed.append(path)
        if len(removed) == 1:
            (folder / "new.block").write_bytes(b"")  # a step works on
        unlink(path, *args, **options)  # another purge was faster: FileNotFoundError

    monkeypatch.setattr(os, "unlink", beside)
    assert BlockCache(cache).expire(keep=0) == 1
    assert [path.name for path in blocks(cache)] == ["new.block"]


def test_a_folder_of_another_user_is_an_error(monkeypatch, cache):
    cache.mkdir()
    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(StoreError, match=rf"^cannot use the folder of {CACHE_VARIABLE}: "):
        BlockCache.from_environment()


def test_a_purge_empties_the_cache(monkeypatch, cache):
    cache.mkdir()
    BlockCache(cache).read("an image of somebody", lambda: b"pixels")
    monkeypatch.setattr(purge, "open_store", lambda _: None)
    monkeypatch.setattr(purge, "purge", lambda *_, **options: PurgeReport(options["dry_run"], DeletionPlan([])))
    assert purge.purge_store("s3://bucket/store", dry_run=True).cached == 0
    assert len(blocks(cache)) == 1
    assert purge.purge_store("s3://bucket/store").cached == 1
    assert not blocks(cache)
