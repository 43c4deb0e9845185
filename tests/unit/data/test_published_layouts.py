"""Data sets in the very files they are published in, written small here and read through the public API."""

import hashlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
import torchvision
from PIL import Image

from salun_core.data import DataSpec, load_data, load_spec
from salun_core.data.published import _from_rows
from salun_core.data.readers import read_table
from salun_core.errors import DataError, UsageError


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def encoded(array, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def cifar(monkeypatch, root, name, train_labels, test_labels):
    """Write CIFAR's pickles and make torchvision expect their checksums; returns train and test pixels."""
    kind = getattr(torchvision.datasets, name)
    folder, key = root / kind.base_folder, "labels" if name == "CIFAR10" else "fine_labels"
    folder.mkdir(parents=True)
    arrays = pixels(len(train_labels)), pixels(len(test_labels), seed=1)
    lists = [entry[0] for entry in kind.train_list], [entry[0] for entry in kind.test_list]
    for files, array, labels in zip(lists, arrays, (train_labels, test_labels), strict=True):
        share = len(labels) // len(files)
        for number, file in enumerate(files):
            part = slice(number * share, (number + 1) * share)
            flat = array[part].transpose(0, 3, 1, 2).reshape(-1, 3072)  # the red plane first, as published
            (folder / file).write_bytes(pickle.dumps({"data": flat, key: list(labels[part])}))
    classes = [f"name{index}" for index in range(10 if name == "CIFAR10" else 100)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    for attribute, files in zip(("train_list", "test_list"), lists, strict=True):
        monkeypatch.setattr(kind, attribute, [[file, md5(folder / file)] for file in files])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    return arrays


def svhn(monkeypatch, root, train_labels, test_labels):
    """Write SVHN's matrices ([H, W, C, N], the digit 0 labelled 10) and make torchvision expect their checksums."""
    arrays = pixels(len(train_labels)), pixels(len(test_labels), seed=1)
    known = {}
    for split, array, labels in zip(("train", "test"), arrays, (train_labels, test_labels), strict=True):
        path = root / f"{split}_32x32.mat"
        column = np.array(labels, dtype=np.uint8)[:, None]
        scipy.io.savemat(path, {"X": array.transpose(1, 2, 3, 0), "y": column})
        known[split] = ["", path.name, md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", known)
    return arrays


def check_same_pixels(data, part, array):
    images = data.images(part)
    assert images.images.shape == (len(array), 3, 32, 32)
    for sample, image in zip(images.ids, images.images, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), array[int(sample.split("/")[1])]), sample


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_in_the_layout_of_torchvision(monkeypatch, tmp_path, name, classes):
    labels = [index * 7 % classes for index in range(20)]
    train, test = cifar(monkeypatch, tmp_path, name, labels, [classes - 1, 0, 1, 2, 3])
    (tmp_path / "spec.yaml").write_text(f"source: torchvision:{name}\nroot: .\nvalidation_fraction: 0\n")
    data = load_data(load_spec(str(tmp_path / "spec.yaml")))
    assert data.table.classes == [f"name{index}" for index in range(classes)]
    assert data.table.labels == [*labels, classes - 1, 0, 1, 2, 3]
    check_same_pixels(data, "train", train)
    check_same_pixels(data, "test", test)


def test_svhn_in_the_layout_of_torchvision(monkeypatch, tmp_path):
    train, test = svhn(monkeypatch, tmp_path, [10, 1, 9, 10, 3], [2, 10])
    spec = DataSpec(source="torchvision:SVHN", root=str(tmp_path), validation_fraction=0.0)
    data = load_data(spec)
    assert data.table.classes == [str(digit) for digit in range(10)]
    assert data.table.labels == [0, 1, 9, 0, 3, 2, 0]
    check_same_pixels(data, "train", train)
    check_same_pixels(data, "test", test)


def test_svhn_labels_that_are_not_digits_are_refused(monkeypatch, tmp_path):
    svhn(monkeypatch, tmp_path, [1, 2, 3], [1])
    labels = {"X": pixels(3).transpose(1, 2, 3, 0), "y": np.array([[1], [2], [11]], dtype=np.uint8)}
    scipy.io.savemat(tmp_path / "train_32x32.mat", labels)
    lists = torchvision.datasets.SVHN.split_list
    monkeypatch.setitem(lists, "train", ["", "train_32x32.mat", md5(tmp_path / "train_32x32.mat")])
    with pytest.raises(
        DataError, match="SVHN has labels outside its 10 classes: 1 rows, the first is row 2 with label 11"
    ):
        load_data(DataSpec(source="torchvision:SVHN", root=str(tmp_path)))


def test_a_damaged_file_is_found_by_its_checksum(monkeypatch, tmp_path):
    cifar(monkeypatch, tmp_path, "CIFAR10", list(range(10)), [0])
    with (tmp_path / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="another checksum") as caught:
        load_data(DataSpec(source="torchvision:CIFAR10", root=str(tmp_path)))
    assert "download=True" not in str(caught.value)


@pytest.mark.parametrize("labels", [[0, 1, 100], [0, -1, 1], [0, 1.5, 1], [0, None, 1]])
def test_cifar_labels_outside_the_classes_are_refused(monkeypatch, tmp_path, labels):
    cifar(monkeypatch, tmp_path, "CIFAR100", labels, [0])
    with pytest.raises(DataError, match="CIFAR100"):
        load_data(DataSpec(source="torchvision:CIFAR100", root=str(tmp_path)))


def test_arrays_give_the_same_as_rows(monkeypatch, tmp_path):
    cifar(monkeypatch, tmp_path, "CIFAR10", [*range(10)], [5])
    svhn(monkeypatch, tmp_path, [10, 1, 2], [5])
    rows = {
        "CIFAR10": torchvision.datasets.CIFAR10(tmp_path, train=True),
        "SVHN": torchvision.datasets.SVHN(tmp_path, split="train"),
    }
    for name, expected in rows.items():
        table = read_table(DataSpec(source=f"torchvision:{name}", root=str(tmp_path)), None, True)
        images, labels = _from_rows(expected)
        assert table.labels == labels
        assert all(np.array_equal(*pair) for pair in zip(table.payloads, images, strict=True))


def test_arrays_that_differ_from_the_rows_are_not_used(monkeypatch, tmp_path):
    cifar(monkeypatch, tmp_path, "CIFAR10", [*range(10)], [5])
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "__getitem__", lambda rows, index: (Image.fromarray(255 - rows.data[index]), 3)
    )
    table = read_table(DataSpec(source="torchvision:CIFAR10", root=str(tmp_path)), None, True)
    assert table.labels == [3] * 10
    assert np.array_equal(table.payloads[4], 255 - pixels(10)[4])


WNIDS = {"n02": "goldfish, Carassius auratus", "n01": "crane", "n03": "crane"}


def tiny_imagenet(root, per_class=2):
    for wnid, colour in zip(sorted(WNIDS), (10, 120, 240), strict=True):
        for index in range(per_class):
            path = root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(np.full((64, 64), colour, dtype=np.uint8), "JPEG"))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t63\t63\n")
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(b"not read")
    lines = []
    for index, wnid in enumerate(["n03", "n01", "n02"]):
        colour = np.full((64, 64, 3), 80 * index, dtype=np.uint8)
        (root / "val" / "images" / f"val_{index}.JPEG").write_bytes(encoded(colour, "JPEG"))
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in [*WNIDS.items(), ("n04", "cat")]))
    return root


def test_tiny_imagenet_as_published(tmp_path):
    folder = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    data = load_data(load_spec(str(folder)).model_copy(update={"validation_fraction": 0.0}))
    assert data.table.classes == ["n01", "goldfish", "n03"]  # two are called crane
    assert sorted(data.split.train) == [f"train/{w}/images/{w}_{i}.JPEG" for w in ("n01", "n02", "n03") for i in (0, 1)]
    assert sorted(data.split.test) == ["test/images/val_0.JPEG", "test/images/val_1.JPEG", "test/images/val_2.JPEG"]
    labels = {sample: data.table.labels[data.table.position[sample]] for sample in data.split.test}
    assert list(labels.values()) == [2, 0, 1]
    images = data.images("train")
    assert images.images.shape == (6, 3, 64, 64)  # grey as they are here
    by_label = {int(label): int(image[0, 0, 0]) for image, label in zip(images.images, images.labels, strict=True)}
    assert by_label == {0: 10, 1: 120, 2: 240}


def test_some_classes_of_tiny_imagenet(tmp_path):
    folder = tiny_imagenet(tmp_path)
    data = load_data(DataSpec(source=str(folder), classes=["n03", "goldfish"], channels=3, validation_fraction=0.0))
    assert data.table.classes == ["n03", "goldfish"]
    assert (len(data.split.train), len(data.split.test)) == (4, 2)
    with pytest.raises(UsageError, match="did you mean 'goldfish'"):
        load_data(DataSpec(source=str(folder), classes=["n03", "goldfisch"]))
    (folder / "words.txt").unlink()
    assert load_data(DataSpec(source=str(folder), validation_fraction=0.0)).table.classes == ["n01", "n02", "n03"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("val_0.JPEG n01\n", "line 1 does not hold an image and a class"),
        ("../../x.JPEG\tn01\n", "line 1"),
        ("val_9.JPEG\tn01\n", "lacks val/images/val_9.JPEG"),
        ("val_0.JPEG\tn77\n", "no images in val"),
        ("", "no images in val"),
        ("\udcff", "cannot read val_annotations.txt"),
    ],
)
def test_broken_annotations_are_refused(tmp_path, text, fault):
    folder = tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=fault):
        load_data(load_spec(str(folder)))


def hub(path, image, label, names, labels, seed=0, **columns):
    """Write a shard as the Hugging Face hub keeps CIFAR: images without a path, class names in the schema."""
    images = [{"bytes": encoded(array), "path": None} for array in pixels(len(labels), seed)]
    features = {label: {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table({image: images, label: labels, **columns})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("held_out", ["test", "valid", "validation"])
def test_cifar10_in_the_layout_of_the_hub(tmp_path, held_out):
    hub(tmp_path / "train-00000-of-00002.parquet", "img", "label", ["cat", "dog"], [0, 1, 1])
    hub(tmp_path / "train-00001-of-00002.parquet", "img", "label", ["cat", "dog"], [1], seed=1)
    hub(tmp_path / f"{held_out}-00000-of-00001-a1b2.parquet", "img", "label", ["cat", "dog"], [1, 0], seed=2)
    data = load_data(load_spec(str(tmp_path)).model_copy(update={"validation_fraction": 0.0}))
    assert list(data.table.classes) == ["cat", "dog"]
    assert list(data.table.labels) == [0, 1, 1, 1, 1, 0]
    assert (len(data.split.train), len(data.split.test)) == (4, 2)
    check_same_pixels(data, "test", pixels(2, seed=2))


def test_cifar100_in_the_layout_of_the_hub(tmp_path):
    names = [f"fine{index}" for index in range(100)]
    hub(tmp_path / "train.parquet", "img", "fine_label", names, [99, 0], coarse_label=[3, 1])
    hub(tmp_path / "test.parquet", "img", "fine_label", names, [50], seed=1, coarse_label=[3])
    data = load_data(load_spec(str(tmp_path)).model_copy(update={"validation_fraction": 0.0}))
    assert (list(data.table.classes), list(data.table.labels)) == (names, [99, 0, 50])
    (tmp_path / "coarse.yaml").write_text("source: .\nlabel_column: coarse_label\nvalidation_fraction: 0\n")
    coarse = load_data(load_spec(str(tmp_path / "coarse.yaml")))
    assert list(coarse.table.labels) == [3, 1, 3]
    with pytest.raises(DataError, match="did you mean 'coarse_label'"):
        load_data(DataSpec(source=str(tmp_path), label_column="coarse"))


def test_a_split_source_is_the_same_under_every_spec(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        for index in range(count):
            path = tmp_path / "set" / part / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(pixels(1, seed=index)[0]))
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "spec.yaml").write_text("source: set\nvalidation_fraction: 0\n")
    by_yaml = load_data(load_spec(str(tmp_path / "spec.yaml")))
    by_folder = load_data(load_spec(str(tmp_path / "set")).model_copy(update={"validation_fraction": 0.0}))
    assert by_yaml.split == by_folder.split
    assert (by_yaml.table.classes, len(by_yaml.split.test)) == (["a", "b"], 2)


def test_folders_called_train_among_others_are_classes(tmp_path):
    for name in ("bus", "test", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(pixels(1)[0]))
    assert read_table(DataSpec(source=str(tmp_path)), tmp_path, True).classes == ["bus", "test", "train"]


def test_two_test_sets_are_refused(tmp_path):
    folder = tiny_imagenet(tmp_path)
    with pytest.raises(DataError, match="two test sets"):
        load_data(DataSpec(source=str(folder), test_source=str(folder)))


def test_a_part_without_labels_is_refused(tmp_path):
    hub(tmp_path / "test.parquet", "image", "label", ["cat", "dog"], [-1, -1])
    with pytest.raises(DataError, match="row 0 with label -1. To fix it: give a part of the data that has labels"):
        load_data(load_spec(str(tmp_path / "test.parquet")))


def test_the_specs_in_the_documentation_are_valid(tmp_path):
    page = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "data-and-models.md"
    specs = re.findall(r"`(source: [^|]+)` \|", page.read_text())
    assert len(specs) == 8
    for text in specs:
        (tmp_path / "spec.yaml").write_text(text.replace("`<br>`", "\n"))
        load_spec(str(tmp_path / "spec.yaml"))
