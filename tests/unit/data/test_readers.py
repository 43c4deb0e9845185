"""Readers on real files in every layout."""

import functools
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from salun_core.data import DataSpec, load_data, load_spec
from salun_core.data.decode import decode
from salun_core.data.readers import read_table
from salun_core.data.table import Table
from salun_core.errors import DataError, SalunError, UsageError
from salun_core.storage import open_store

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def png(colour, size=(6, 6), mode="RGB"):
    import io

    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, labels, images=None, metadata=None, **columns):
    images = images or [{"bytes": png((index, 0, 0)), "path": f"img{index}.png"} for index in range(len(labels))]
    table = pyarrow.table({"image": images, "label": labels, **columns})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def read(source, **spec):
    return read_table(DataSpec(source=str(source), **spec), Path(source), True)


def folder_of(root, layout):
    for name, colour in layout.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(colour))
    return root


def test_digits_need_no_download():
    data = load_data(DataSpec(source="digits"))
    assert len(data.table) == 1797
    assert data.table.classes == [str(index) for index in range(10)]
    train = data.images("train")
    assert (train.images.shape[1:], train.images.dtype) == ((1, 8, 8), torch.uint8)
    assert int(train.images.max()) == 255
    assert {s: len(getattr(data.split, s)) for s in ("train", "validation", "test")} == {
        "train": 1295,
        "validation": 143,
        "test": 359,
    }


@pytest.mark.slow
def test_torchvisions_fake_data(monkeypatch):
    import torchvision

    few = functools.partial(torchvision.datasets.FakeData, 30, (3, 20, 24))  # by default, 1000 large images
    monkeypatch.setattr(torchvision.datasets, "FakeData", few)
    table = read_table(DataSpec(source="torchvision:FakeData"), None, True)
    assert len(table) == 30
    assert len(table.classes) == 10
    assert table.payloads[0].shape == (20, 24, 3)


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_torchvision_data_on_disk_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    data = load_data(DataSpec(source="torchvision:MNIST", root=str(tmp_path), validation_fraction=0.0))
    assert (len(data.split.train), len(data.split.test)) == (40, 20)
    assert data.images("test").images.shape == (20, 1, 28, 28)
    assert data.table.classes[3] == "3 - three"


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN", "CocoDetection", "VOCDetection", "CelebA", "ImageFolder"])
def test_missing_torchvision_data_are_not_downloaded(tmp_path, name):
    with pytest.raises(DataError, match="cannot read torchvision's"):
        load_data(DataSpec(source=f"torchvision:{name}", root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_torchvision_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'CIFAR10'"):
        load_data(DataSpec(source="torchvision:CIFAR11"))


def test_a_folder_of_class_folders(tmp_path):
    layout = {"cat/1.png": "red", "cat/deep/2.PNG": "blue", "dog/1.png": "green", "dog/notes.txt": "red"}
    table = read(folder_of(tmp_path, layout))
    assert list(table.ids) == ["cat/1.png", "cat/deep/2.PNG", "dog/1.png"]
    assert list(table.labels) == [0, 0, 1]
    assert list(table.classes) == ["cat", "dog"]
    assert list(read(tmp_path, classes=["dog", "cat"]).labels) == [0, 1, 1]


def test_folders_that_are_not_data_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match="no class folders"):
        read(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        read(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match="neither a folder nor a parquet"):
        read(tmp_path / "file.txt")
    with pytest.raises(UsageError, match="no data at"):
        read(tmp_path / "absent")


def test_an_image_file_above_the_size_limit_is_refused(tmp_path):
    folder_of(tmp_path, {"cat/1.png": "red"})
    with (tmp_path / "cat" / "1.png").open("r+b") as file:
        file.truncate(65 * 1024 * 1024)
    with pytest.raises(DataError, match=r"1\.png is too large"):
        read(tmp_path)


def test_parquet_in_the_hugging_face_layout(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    path = write_parquet(tmp_path / "train.parquet", [1, 0, 1], metadata={"info": {"features": features}})
    table = read(path)
    assert list(table.classes) == ["cat", "dog"]
    assert list(table.labels) == [1, 0, 1]
    assert list(table.ids) == ["img0.png", "img1.png", "img2.png"]
    images = decode(table.payloads, table.ids, None, None)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("metadata", [{}, {"info": None}, {"info": {"features": {"label": {"names": None}}}}, [1], "x"])
def test_other_metadata_in_the_schema_are_ignored(tmp_path, metadata):
    assert read(write_parquet(tmp_path / "a.parquet", [0, 2], metadata=metadata)).classes == ["0", "1", "2"]


def test_parquet_with_names_as_labels(tmp_path):
    table = read(write_parquet(tmp_path / "a.parquet", ["dog", "cat", "dog"]))
    assert (list(table.classes), list(table.labels)) == (["cat", "dog"], [1, 0, 1])
    assert list(read(tmp_path / "a.parquet", classes=["dog", "cat"]).labels) == [0, 1, 0]


def test_parquet_with_whole_numbers_as_floats(tmp_path):
    assert list(read(write_parquet(tmp_path / "a.parquet", [1.0, 0.0]), classes=["a", "b"]).labels) == [1, 0]


def test_parquet_with_other_column_names_and_subjects(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 1, 0, 1], who=["ann", "bob", None, ""])
    renamed = pyarrow.parquet.read_table(path).rename_columns(["picture", "kind", "who"])
    pyarrow.parquet.write_table(renamed, path)
    table = read(path, image_column="picture", label_column="kind", subject_column="who")
    assert list(table.subjects) == ["ann", "bob", None, None]
    with pytest.raises(DataError, match="no column 'image'"):
        read(path)
    with pytest.raises(DataError, match="did you mean 'who'"):
        read(path, image_column="picture", label_column="kind", subject_column="whoo")


def test_a_folder_of_parquet_files_with_class_names_in_a_file(tmp_path):
    write_parquet(tmp_path / "0.parquet", [0, 1])
    write_parquet(tmp_path / "1.parquet", [2])
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    table = read(tmp_path)
    assert (list(table.classes), list(table.labels)) == (["a", "b", "c"], [0, 1, 2])
    assert list(table.ids) == ["000000", "000001", "000002"]  # the paths in the two files are not unique


@pytest.mark.parametrize("text", ['{"a": 1}', "- [", '"cat"', "3"])
def test_a_broken_list_of_classes_is_refused(tmp_path, text):
    write_parquet(tmp_path / "0.parquet", [0, 1])
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(SalunError, match=r"classes\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("labels", "classes", "first"),
    [
        ([0, 1, 5], ["a", "b"], "row 2 with label 5"),
        ([0, -1], [], "row 1 with label -1"),
        ([0, None], [], "row 1 with label None"),
        ([0, 10**12], [], "row 1"),
        (["a", "x"], ["a", "b"], "row 1 with label 'x'"),
        ([0.5, 1.0], ["a", "b"], "row 0 with label 0.5"),
        ([0.0, float("nan")], ["a", "b"], "row 1 with label nan"),
        ([[0], [1]], ["a", "b"], "row 0"),
        ([None, None], [], "row 0"),
    ],
)
def test_bad_labels_are_refused(tmp_path, labels, classes, first):
    with pytest.raises(DataError, match=first):
        read(write_parquet(tmp_path / "a.parquet", labels), classes=classes)


def test_images_that_are_only_paths_are_refused(tmp_path):
    images = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    with pytest.raises(DataError, match="row 0 of a.parquet has no image bytes"):
        read(write_parquet(tmp_path / "a.parquet", [0, 1], images))
    with pytest.raises(DataError, match="no image bytes"):
        read(write_parquet(tmp_path / "b.parquet", [0, 1], [b"", b""]))


def test_images_can_be_plain_bytes(tmp_path):
    table = read(write_parquet(tmp_path / "a.parquet", [0, 1], [png("red"), png("blue")]))
    assert list(table.ids) == ["000000", "000001"]


def test_damaged_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [0, 1])
    data = path.read_bytes()
    for bad in (b"", b"PAR1", data[:-20], data[: len(data) // 2]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="cannot read a.parquet"):
            read(path)


METADATA = "file_name,person\ncat/1.png,ann\ndog/1.png,\n"


def test_subjects_come_from_a_metadata_table(tmp_path):
    folder = folder_of(tmp_path / "images", {"cat/1.png": "red", "cat/2.png": "red", "dog/1.png": "red"})
    (tmp_path / "people.csv").write_text(METADATA)
    table = read(folder, metadata=str(tmp_path / "people.csv"), subject_column="person")
    assert list(table.subjects) == ["ann", None, None]
    people = pyarrow.table({"file_name": ["cat/2.png", "dog/1.png"], "person": ["bob", None]})
    pyarrow.parquet.write_table(people, tmp_path / "people.parquet")
    table = read(folder, metadata=str(tmp_path / "people.parquet"), subject_column="person")
    assert list(table.subjects) == [None, "bob", None]
    assert not any(read(folder, metadata=str(tmp_path / "people.csv")).subjects)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"name,person\na,b\n", "lacks a column"),
        (b"file_name,other\na,b\n", "lacks a column"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_bad_metadata_are_refused(tmp_path, data, why):
    folder = folder_of(tmp_path / "images", {"cat/1.png": "red"})
    (tmp_path / "people.csv").write_bytes(data)
    with pytest.raises(DataError, match=why):
        read(folder, metadata=str(tmp_path / "people.csv"), subject_column="person")
    with pytest.raises(DataError, match="cannot read metadata"):
        read(folder, metadata=str(tmp_path / "absent.csv"), subject_column="person")


def test_corrupt_images_are_named():
    whole = png("red")
    for bad in (b"", b"x" * 50, whole[:40], whole[:-24], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n"):
        with pytest.raises(DataError, match="image second is corrupt"):
            decode([whole, bad], ["first", "second"], None, None)
    with pytest.raises(DataError, match="image second is corrupt"):
        decode([bad, whole], ["second", "first"], None, None)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@settings(max_examples=150)
@given(
    place=st.integers(0, 10_000),
    value=st.integers(0, 255),
    cut=st.integers(0, 10_000),
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM"]),
)
def test_damaged_images_give_only_salun_errors(place, value, cut, kind):
    import io

    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, kind)
    data = bytearray(file.getvalue())
    data[place % len(data)] = value
    data = bytes(data[: len(data) - cut % 3])
    try:
        images = decode([data], ["x"], 8, 3)
    except DataError:
        return
    assert images.shape == (1, 3, 8, 8)


def test_sizes_must_agree_or_be_set():
    payloads, ids = [png("red", (6, 6)), png("red", (9, 6))], ["a", "b"]
    with pytest.raises(DataError, match="image b has another size: 9 x 6; the first image has 6 x 6"):
        decode(payloads, ids, None, None)
    assert decode(payloads, ids, 4, None).shape == (2, 3, 4, 4)
    with pytest.raises(DataError, match="there are no images"):
        decode([], [], None, None)


def test_resizing_keeps_the_middle():
    array = np.zeros((8, 16, 3), dtype=np.uint8)
    array[:, 4:12] = 200  # the middle half, which the crop keeps
    image = decode([array], ["a"], 8, 3)
    assert image.shape == (1, 3, 8, 8)
    assert int(image.min()) > 150


def test_channels_are_those_of_the_spec_or_the_first_image():
    grey, colour = png(128, mode="L"), png((10, 20, 30))
    assert decode([grey, colour], ["a", "b"], None, None).shape[1] == 1
    assert decode([colour, grey], ["a", "b"], None, None)[1].unique().tolist() == [128]
    assert decode([colour], ["a"], None, 1).shape == (1, 1, 6, 6)
    assert decode([np.full((5, 5, 1), 7, dtype=np.uint8)], ["a"], None, 3).shape == (1, 3, 5, 5)
    assert decode([png((1, 2, 3, 4), mode="RGBA")], ["a"], None, None)[0, :, 0, 0].tolist() == [1, 2, 3]


def test_train_and_test_sources_are_joined(tmp_path):
    train = write_parquet(tmp_path / "train.parquet", ["a", "b"] * 5)
    test = write_parquet(tmp_path / "test.parquet", ["b", "a"])
    data = load_data(DataSpec(source=str(train), test_source=str(test), validation_fraction=0.2))
    assert set(data.split.test) == {"test/img0.png", "test/img1.png"}
    assert len(data.split.train) == 8
    assert all(sample.startswith("train/") for sample in [*data.split.train, *data.split.validation])
    write_parquet(tmp_path / "test.parquet", ["b", "c"])
    with pytest.raises(DataError, match="'a' is only in one"):
        load_data(DataSpec(source=str(train), test_source=str(test)))
    other = DataSpec(source=str(train), test_source=str(test), classes=["c", "b", "a"])
    assert load_data(other).table.classes == ["c", "b", "a"]


def test_classes_in_another_order_are_refused():
    left, right = (Table(["x"], [0], [b""], names) for names in (["a", "b"], ["b", "a"]))
    with pytest.raises(DataError, match="order differs"):
        left.joined(right)


def test_a_builtin_can_be_the_test_source_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(20):
        path = tmp_path / str(index % 10) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    data = load_data(DataSpec(source=str(tmp_path), test_source="digits", validation_fraction=0.0))
    assert (len(data.split.train), len(data.split.test)) == (20, 1797)


def test_specs_from_command_line_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1])
    write_parquet(tmp_path / "set" / "val.parquet", [0, 1])
    (tmp_path / "spec.yaml").write_text("source: set/train.parquet\nmetadata: people.csv\nsize: 8\n")
    assert load_spec("digits") == DataSpec(source="digits")
    assert load_spec("torchvision:CIFAR10").source == "torchvision:CIFAR10"
    assert load_spec("s3://bucket/data").source == "s3://bucket/data"
    of_folder = load_spec("set")
    assert of_folder.source == str(tmp_path / "set" / "train.parquet")
    assert of_folder.test_source == str(tmp_path / "set" / "val.parquet")
    assert load_spec("set/train.parquet") == DataSpec(source=str(tmp_path / "set" / "train.parquet"))
    of_file = load_spec("spec.yaml")
    assert of_file.source == str(tmp_path / "set" / "train.parquet")
    assert of_file.metadata == str(tmp_path / "people.csv")
    folder_of(tmp_path / "plain", {"cat/1.png": "red"})
    assert load_spec("plain").test_source is None
    folder_of(tmp_path / "parts", {"train/cat/1.png": "red", "test/cat/1.png": "red"})
    assert load_spec("parts").test_source == str(tmp_path / "parts" / "test")


def test_specs_with_faults_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        load_spec("digit")
    for text in ("nowhere/at/all", "absent.parquet", "absent.yaml"):
        with pytest.raises(UsageError):
            load_spec(text)
    (tmp_path / "spec.yaml").write_text("sauce: x\nsize: 2\nchannels: 4\nvalidation_fraction: 1\n")
    with pytest.raises(UsageError) as caught:
        load_spec("spec.yaml")
    for fault in ("source", "sauce: unknown key, did you mean 'source'?", "size", "channels", "validation_fraction"):
        assert fault in str(caught.value)


@pytest.mark.s3
def test_data_in_a_store(store, tmp_path):
    train = write_parquet(tmp_path / "train.parquet", ["a", "b"] * 5)
    store.upload(train, "set/train.parquet")
    store.upload(train, "settle/train.parquet")
    spec = DataSpec(source=f"{store.uri}/set", validation_fraction=0.0)
    from_store, local = load_data(spec), load_data(DataSpec(source=str(train), validation_fraction=0.0))
    assert from_store.split == local.split
    one = load_data(DataSpec(source=f"{store.uri}/set/train.parquet", validation_fraction=0.0))
    assert one.split.digest == local.split.digest
    assert open_store(store.uri).list("set/")
    with pytest.raises(DataError, match="no object has that prefix"):
        load_data(DataSpec(source=f"{store.uri}/absent"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
@pytest.mark.parametrize(
    ("name", "spec", "classes", "shape"),
    [
        ("cifar10", {"train_limit": 200, "test_limit": 100}, 10, (3, 32, 32)),
        ("imagenette160", {"train_limit": 60, "test_limit": 40, "size": 64}, 10, (3, 64, 64)),
    ],
)
def test_real_data(name, spec, classes, shape):
    data = load_data(load_spec(str(SHARED / name)).model_copy(update=spec))
    assert len(data.table.classes) == classes
    images = data.images("train")
    assert images.images.shape[1:] == shape
    assert len(set(images.labels.tolist())) == classes


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
def test_real_faces_name_their_subjects():
    table = pyarrow.parquet.read_schema(SHARED / "faces" / "faces.parquet")
    subject = next(name for name in table.names if "subject" in name or "person" in name or "identity" in name)
    read_back = read(SHARED / "faces" / "faces.parquet", subject_column=subject)
    assert len(set(read_back.subjects)) > 1
