"""Images that are streamed: the same bits as in memory, only what is needed, and clear errors."""

import errno
import io
import json
import os
import tarfile
import zlib
from functools import partial

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from salun_core.data import DataSpec, ImageSet, load_data, stream
from salun_core.data.images import Normalisation
from salun_core.data.readers import read_table
from salun_core.data.stream import StreamedImages
from salun_core.data.table import Encoded
from salun_core.data.targets import SamplesTarget
from salun_core.errors import DataError, IntegrityError, StoreError, UsageError
from salun_core.evaluation import Splits
from salun_core.evaluation.classifier import split_outputs
from salun_core.evaluation.evidence import Measured, RunFacts
from salun_core.methods.checkpoint import FileCheckpoint
from salun_core.methods.classification import method_config, unlearn
from salun_core.methods.classification.method import shares
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks import inputs_of, task_of
from salun_core.tasks.classification.training import train_model, training_config
from salun_core.tasks.task import Candidate, EvaluationOptions

VARIABLE = "SALUN_IMAGE_MEMORY"
CPU = torch.device("cpu")
SPEC = {"validation_fraction": 0.1, "test_fraction": 0.2, "augment": "crop-flip"}


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def images(count, seed=0, side=8):
    rng = np.random.default_rng(seed)
    return [encoded(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def write(folder, rows, first=0, name="train-0.parquet", group=7):
    """Write a shard of labelled images; labels of its rows repeat 0, 1, 2."""
    table = pyarrow.table(
        {"image": [{"bytes": row} for row in rows], "label": [(first + i) % 3 for i in range(len(rows))]}
    )
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(table, folder / name, row_group_size=group)


@pytest.fixture
def shards(tmp_path):
    """Two files of images, 90 rows in all."""
    rows = images(90)
    write(tmp_path / "data", rows[:50])
    write(tmp_path / "data", rows[50:], 50, "train-1.parquet")
    return tmp_path / "data"


def streamed(monkeypatch, source, **spec):
    monkeypatch.setenv(VARIABLE, "0")
    data = load_data(DataSpec(source=str(source), **{**SPEC, **spec}))
    monkeypatch.delenv(VARIABLE)
    return data


def folder_of_images(root):
    for index, row in enumerate(images(60)):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row)
    return root


def same(first, second):
    assert torch.equal(first.labels, second.labels)
    assert list(first.ids) == list(second.ids)
    for generators in ([None, None], [torch.Generator().manual_seed(5) for _ in range(2)]):
        pairs = zip(*(s.batches(16, g, True) for s, g in zip((first, second), generators, strict=True)), strict=True)
        for (left, left_labels), (right, right_labels) in pairs:
            assert torch.equal(left, right)
            assert left.stride() == right.stride()
            assert torch.equal(left_labels, right_labels)


@pytest.mark.parametrize("layout", ["parquet", "folder"])
@pytest.mark.parametrize("spec", [{}, {"size": 5, "channels": 1}])
def test_a_stream_has_the_bits_of_images_in_memory(monkeypatch, tmp_path, shards, layout, spec):
    source = shards if layout == "parquet" else folder_of_images(tmp_path / "images")
    stream, memory = streamed(monkeypatch, source, **spec), load_data(DataSpec(source=str(source), **SPEC, **spec))
    assert stream.split.digest == memory.split.digest
    ours, theirs = stream.images("train"), memory.images("train")
    assert (type(ours), type(theirs)) == (StreamedImages, ImageSet)
    assert ours.normalisation == theirs.normalisation
    assert ours.shape == theirs.shape
    same(ours, theirs)
    changed = torch.arange(len(ours))
    sets = [
        one.select([9, 2, 2, 0]).joined(one.relabelled(changed).select(torch.tensor([5]))) for one in (ours, theirs)
    ]
    same(*sets)
    assert torch.equal(ours.pixels([3, 1]), theirs.pixels([3, 1]))
    assert torch.equal(stream.pixels(ours.ids[:4]), memory.pixels(ours.ids[:4]))
    same(stream.images("test", ours.normalisation), memory.images("test", ours.normalisation))


class _KilledError(Exception):
    pass


def kill(record):
    raise _KilledError


def test_all_steps_give_the_same_from_both_sources_and_resume_from_either(monkeypatch, tmp_path, shards):
    """Training, mask, unlearning and evaluation; the unlearning is killed after an epoch and resumes on the other."""
    common = {"epochs": 2, "batch_size": 16, "device": "cpu"}
    found, checkpoint = [], FileCheckpoint(tmp_path / "checkpoint")
    for memory in ("0", "4"):
        monkeypatch.setenv(VARIABLE, memory)
        spec, folder = DataSpec(source=str(shards), **SPEC), tmp_path / memory
        made = train_model(spec, "resnet8", training_config({**common, "learning_rate": 0.05}), folder)
        task, config = task_of(folder), method_config("salun", {**common, "learning_rate": 0.01})
        model = task.load(folder)
        inputs = inputs_of(task, model, [SamplesTarget(ids=model.split.ids("train")[:8])])
        assert isinstance(inputs.forget, StreamedImages if memory == "0" else ImageSet)
        mask = SaliencyMask.from_scores(task.score(inputs, config, CPU, SINGLE_PROCESS).values, 0.5)
        if memory == "0":
            with pytest.raises(_KilledError):
                task.unlearn(inputs, "salun", config, mask, checkpoint, on_epoch=kill)
        result = task.unlearn(inputs, "salun", config, mask)
        metrics = task.evaluate(inputs, Candidate(model, RunFacts(), mask), EvaluationOptions(device=CPU)).metrics
        found.append((made, mask.digest, model_digest(result.model), metrics))
    assert found[0] == found[1]
    resumed = task.unlearn(inputs, "salun", config, mask, checkpoint)
    assert model_digest(resumed.model) == found[0][2]


def test_processes_decode_their_own_rows_and_their_shares_are_the_batches_of_one(monkeypatch, shards):
    """Order and augmentation are drawn as by one process; only the pixels of the others are left alone."""
    known, config = Normalisation((0.5,) * 3, (0.2,) * 3), UnlearnConfig(batch_size=16)
    alone = load_data(DataSpec(source=str(shards), **SPEC)).images("train", known)
    whole = list(alone.batches(16, torch.Generator().manual_seed(5), True))
    decode, decoded, drawn = stream.decode_one, {0: set(), 1: set()}, []
    for rank, names in decoded.items():
        monkeypatch.setattr(stream, "decode_one", decode)
        mine = streamed(monkeypatch, shards).images("train", known)
        count = partial(lambda names, *given: names.add(given[1]) or decode(*given), names)
        monkeypatch.setattr(stream, "decode_one", count)
        generator = torch.Generator().manual_seed(5)
        drawn.append(list(shares(mine, config, generator, ProcessGroup(rank, 2))))
    assert not decoded[0] & decoded[1]
    assert len(decoded[0] | decoded[1]) == len(alone)
    for (images, labels), *parts in zip(whole, *drawn, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), images)
        assert torch.equal(torch.cat([part.labels for part in parts]), labels)
        assert sum(part.weight for part in parts) == 1
    first = set(decoded[1])
    list(shares(mine, config, generator, ProcessGroup(1, 2)))
    assert first < decoded[1]  # another order: the next pass decodes what it lacks


def test_only_the_rows_of_a_pass_are_read(monkeypatch, shards):
    data = streamed(monkeypatch, shards, size=8)
    train = data.images("train", Normalisation((0.5,) * 3, (0.2,) * 3))
    (shards / "train-1.parquet").unlink()
    first = [place for place, sample in enumerate(train.ids) if int(sample) < 50]
    batches = list(train.select(first).batches(8))
    assert sum(len(labels) for _, labels in batches) == len(first)
    with pytest.raises(DataError, match=r"cannot read train-1\.parquet"):
        next(train.batches(8))
    assert len(train.select(first).pixels(range(3))) == 3  # what was decoded before stays valid


def test_an_evaluation_of_samples_decodes_them_and_the_forget_set(monkeypatch, shards):
    data = streamed(monkeypatch, shards, size=8)
    train = data.images("train", Normalisation((0.5,) * 3, (0.2,) * 3))
    whole = Splits(train.select(range(5)), train.select(range(5, 63)), data.images("test", train.normalisation))
    measured = Measured(before="b", after="a", dataset="d", split="s", forget_set="f")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    found = split_outputs(model, whole.sampled(12, measured))
    assert {name: len(outputs) for name, outputs in found.items()} == {"forget": 5, "retain": 12, "test": 12}
    assert int(train.decoded._decoded.sum()) == 5 + 12 + 12


def test_what_the_next_passes_need_is_read_in_one(monkeypatch, shards):
    data = streamed(monkeypatch, shards, size=8)
    train = data.images("train", Normalisation((0.5,) * 3, (0.2,) * 3))
    some, test = train.select(range(5)), data.images("test", train.normalisation)
    memory = load_data(DataSpec(source=str(shards), **SPEC)).images("test", train.normalisation)
    read, reads = Encoded.read, []
    monkeypatch.setattr(Encoded, "read", lambda payloads, rows: reads.append(len(rows)) or read(payloads, rows))
    stream.decode_together([some, memory, test])
    assert reads == [5 + len(test)]
    assert [len(labels) for images in (some, test) for _, labels in images.batches(99)] == [5, len(test)]
    assert reads == [5 + len(test)]


@pytest.mark.parametrize("method", ["random_label", "scrub", "sfr_on", "amun", "msg"])
def test_an_epoch_decodes_what_it_draws_of_the_retained_images(monkeypatch, shards, method):
    """5 images to forget, and 0.1 of 58 retained ones in each of two epochs; MSG and SFR-on draw once more."""
    train = streamed(monkeypatch, shards, size=8).images("train", Normalisation((0.5,) * 3, (0.2,) * 3))
    forget, retain = train.select(range(5)), train.select(range(5, 63))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    config = {"epochs": 2, "retain_fraction": 0.1, "device": "cpu", "order": "mixed"}
    settings = {key: value for key, value in config.items() if key != "order" or method == "random_label"}
    decoded = []

    def count(record):
        decoded.append(int(train.decoded._decoded.sum()))

    unlearn(model, method, forget=forget, retain=retain, config=settings, on_epoch=count)
    once = {"sfr_on": 6, "msg": 5}.get(method, 0)
    assert 11 <= decoded[0] <= 11 + once
    assert decoded[0] < decoded[1] <= 17 + once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
            r"image 00005[12] \(row [12] of train-1\.parquet\) changed",
        ),
        (lambda rows: rows[:30], r"train-1\.parquet changed: it has 30 rows, and had 40"),
        (None, r"cannot read train-1\.parquet"),
    ],
    ids=["moved", "shorter", "cut"],
)
def test_a_shard_that_changes_during_a_run_is_named(monkeypatch, shards, change, message):
    train = streamed(monkeypatch, shards, size=8).images("train", Normalisation((0.5,) * 3, (0.2,) * 3))
    if change:
        write(shards, change(images(90)[50:]), 50, "train-1.parquet")
    else:
        os.truncate(shards / "train-1.parquet", 2000)
    with pytest.raises((DataError, IntegrityError), match=message):
        next(train.batches(8))


def bomb():
    """Return a PNG of a few bytes that claims 40,000 x 40,000 pixels."""
    header = b"IHDR" + (40_000).to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0))
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) for chunk in chunks
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (bomb(), r"image 000061 \(row 11 of train-1\.parquet\) is corrupt: .*pixels"),
        (b"text", r"image 000061 \(row 11 of train-1\.parquet\) is corrupt"),
        (images(1, side=9)[0], r"image 000061 \(row 11 of train-1\.parquet\) has another size: 9 x 9"),
    ],
    ids=["bomb", "text", "size"],
)
def test_a_bad_image_is_named_with_its_shard(monkeypatch, shards, bad, message):
    rows = images(90)[50:]
    write(shards, [*rows[:11], bad, *rows[12:]], 50, "train-1.parquet")
    data = streamed(monkeypatch, shards)
    with pytest.raises(DataError, match=message) as caught:
        [data.images(name) for name in ("train", "validation", "test")]
    assert "\n" not in str(caught.value)


def test_rows_without_bytes_are_refused_when_the_data_are_loaded(monkeypatch, shards):
    write(shards, [*images(4), b""], 50, "train-1.parquet")
    with pytest.raises(DataError, match=r"row 4 of train-1\.parquet has no image bytes"):
        streamed(monkeypatch, shards)


def test_the_file_has_no_name_and_a_full_disk_is_reported(monkeypatch, shards, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    train = streamed(monkeypatch, shards).images("train")
    assert not list(folder.iterdir())
    assert len(list(train.batches(8))) == 9

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    again = streamed(monkeypatch, shards)
    with pytest.raises(StoreError, match="cannot keep decoded images.*No space left.*TMPDIR"):
        again.images("train")


def test_the_budget_decides(monkeypatch, shards):
    def kind(gigabytes):
        monkeypatch.setenv(VARIABLE, gigabytes)
        return type(load_data(DataSpec(source=str(shards))).images("test"))

    size = sum(path.stat().st_size for path in shards.iterdir())
    assert kind(f"{size / 4e9:.9f}") is StreamedImages
    assert kind(f"{(size + 90 * 300) / 1e9:.9f}") is ImageSet
    for wrong in ("much", "-1", "nan"):
        with pytest.raises(UsageError, match="SALUN_IMAGE_MEMORY is not a size"):
            kind(wrong)


def test_sets_in_different_places_cannot_be_joined(monkeypatch, shards):
    stream, memory = streamed(monkeypatch, shards), load_data(DataSpec(source=str(shards), **SPEC))
    sets = stream.images("train"), memory.images("train"), streamed(monkeypatch, shards).images("train")
    for first, second in ((0, 1), (1, 0), (0, 2)):
        with pytest.raises(DataError, match="cannot be joined"):
            sets[first].joined(sets[second])


def archive(path, members):
    """Write a tar of (name, bytes); bytes that are a number make a link."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(member, io.BytesIO(data or b""))
    return path


def samples(rows, first=0):
    """Return the members of samples with `.cls`, and of one with a `.json` that names its person."""
    found = [(f"a/{index:03d}.png", row) for index, row in enumerate(rows, first)]
    labels = [(name.replace("png", "cls"), b"%d\n" % (place % 3)) for place, (name, _) in enumerate(found)]
    return [member for pair in zip(found, labels, strict=True) for member in pair]


def test_archives_of_samples(monkeypatch, tmp_path):
    rows = images(60)
    archive(tmp_path / "tars" / "0.tar", samples(rows[:30]))
    archive(tmp_path / "tars" / "1.tar", [*samples(rows[30:], 30), ("readme.txt", b"about")])
    stream, memory = (
        streamed(monkeypatch, tmp_path / "tars"),
        load_data(DataSpec(source=str(tmp_path / "tars"), **SPEC)),
    )
    assert list(memory.table.ids) == [f"a/{index:03d}" for index in range(60)]
    assert list(memory.table.payloads) == rows
    same(stream.images("train"), memory.images("train"))
    named = archive(tmp_path / "n.tar", [("1.png", rows[1]), ("1.json", b'{"label": "cat", "who": "p7"}')])
    table = read_table(DataSpec(source=str(named), subject_column="who"), named, True)
    assert (table.classes, table.labels, table.subjects) == (["cat"], [0], ["p7"])
    os.truncate(tmp_path / "tars" / "1.tar", 3000)
    with pytest.raises(DataError, match=r"cannot read 1\.tar: it ends in row"):
        stream.pixels(stream.table.ids[40:])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../x.png", b"1"), ("../x.cls", b"0")], "leads out"),
        ([("/x.png", b"1"), ("/x.cls", b"0")], "leads out"),
        ([("x.png", None)], "not a plain file"),
        ([("x.png", b"1")], "no label"),
        ([("x.png", b"1"), ("x.jpg", b"1")], "two files of this kind"),
        ([("x.png", b"1"), ("x.json", b"[" * 100_000)], "no label"),
        ([("x.png", b"1"), ("x.json", b'{"label": [1]}')], "neither a number nor a name"),
        ([("x.png", b"1"), ("x.cls", b"0"), ("y.png", b"1"), ("y.cls", b"cat")], "two kinds of labels"),
        (
            [("x.png", b"1"), ("x.cls", b"0"), ("y.png", b"1"), ("y.cls", b"0"), ("x.png", b"1"), ("x.cls", b"0")],
            "twice",
        ),
        ([("x.cls", b"0")], "holds no samples"),
    ],
)
def test_bad_archives_are_refused(tmp_path, members, message):
    path = archive(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        read_table(DataSpec(source=str(path)), path, True)


def test_a_packed_archive_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"cannot read x\.tar.*uncompressed"):
        read_table(DataSpec(source="x"), tmp_path / "x.tar", True)


def save(folder, rows, file="data-00000-of-00001.arrow", listed=None):
    """Write a data set in the layout of `Dataset.save_to_disk`: Arrow streams of 16 rows each, and two documents."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    paths = [f"{index}.png" for index in range(len(rows))]
    images = [{"bytes": row, "path": path} for row, path in zip(rows, paths, strict=True)]
    table = pyarrow.table({"image": images, "label": [index % 3 for index in range(len(rows))]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = table.replace_schema_metadata(metadata)
    folder.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(folder / file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, 16)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": listed or [{"filename": file}], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_saved_data_sets(monkeypatch, tmp_path):
    rows = images(90)
    folder = save(tmp_path / "saved", rows)
    stream, memory = streamed(monkeypatch, folder), load_data(DataSpec(source=str(folder), **SPEC))
    assert memory.table.classes == ["a", "b", "c"]
    assert list(memory.table.ids)[:2] == ["0.png", "1.png"]
    assert list(memory.table.payloads) == rows
    same(stream.images("train"), memory.images("train"))
    save(folder, rows[:40])
    with pytest.raises(DataError, match=r"00001\.arrow changed: it has 40 rows, and had 90"):
        stream.pixels(["80.png"])
    os.truncate(folder / "data-00000-of-00001.arrow", 2000)
    with pytest.raises(DataError, match=r"cannot read data-00000-of-00001\.arrow"):
        stream.pixels(["80.png"])


def test_saved_parts_keep_their_split(tmp_path):
    save(tmp_path / "both" / "train", images(30))
    save(tmp_path / "both" / "test", images(12, seed=1))
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    data = load_data(DataSpec(source=str(tmp_path / "both")))
    assert len(data.split.test) == 12


def test_a_saved_data_set_names_only_its_own_files(tmp_path):
    for listed in ([{"filename": "../x.arrow"}], [{}], {"a": 1}):
        folder = save(tmp_path / "x", images(3), listed=listed)
        with pytest.raises(DataError, match=r"state\.json of x is damaged|cannot read None"):
            load_data(DataSpec(source=str(folder)))
