"""Faults of data and architectures, as the verbs tell them: one line, with the exit code that they promise."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

NAMES = ["ape", "bear", "cat"]


def encoded(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def parquet(path, labels, start=0):
    images = [encoded(start + index) for index in range(len(labels))]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)


def data(folder, train_labels, test_labels):
    """Write train and test data and their spec; returns its path."""
    folder.mkdir(exist_ok=True)
    parquet(folder / "train.parquet", train_labels)
    parquet(folder / "test.parquet", test_labels, start=1000)
    classes = json.dumps(NAMES)
    (folder / "spec.yaml").write_text(f"source: .\nclasses: {classes}\nvalidation_fraction: 0\n")
    return folder / "spec.yaml"


def told(result, code):
    """Return the one line that a failed verb says."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert "To fix it:" in lines[0]
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    return lines[0]


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ([0, 1, 3], "row 2 with label 3"),
        ([0, -1, 1], "row 1 with label -1"),
        ([0.0, 0.5, 1.0], "row 1 with label 0.5"),
        ([0, None, 1], "row 1 with label None"),
        (["ape", "dog", "cat"], "row 1 with label 'dog'"),
    ],
)
def test_training_refuses_labels_that_are_no_class(salun, tmp_path, labels, first):
    spec = data(tmp_path / "data", labels, [0, 1, 2])
    line = told(salun("train", "--data", spec, "--arch", "resnet8", "--out", "model"), 1)
    assert "train.parquet has labels outside its 3 classes" in line or "data has labels outside its 3 classes" in line
    assert first in line
    assert not (tmp_path / "model").exists()


@pytest.fixture
def trained(salun, tmp_path):
    """A model whose data have no training image of the class cat."""
    spec = data(tmp_path / "data", [0, 1] * 4, [0, 1, 2])
    result = salun("train", "--data", spec, "--arch", "resnet8", "--epochs", 1, "--out", "model")
    assert result.exit_code == 0, result.stderr
    result = salun("mask", "--model", "model", "--forget", _forget(tmp_path, "ape"), "--out", "mask.st")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "model"


def _forget(folder, name):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"kind": "class", "class_id": name}))
    return path


def verbs(model, forget):
    yield "mask", "--model", model, "--forget", forget, "--out", "new.st"
    yield "unlearn", "--model", model, "--forget", forget, "--mask", "mask.st", "--out", "new"
    yield "unlearn", "--model", model, "--forget", forget, "--method", "finetune", "--out", "new"


def test_a_class_without_training_images_cannot_be_forgotten(salun, trained, tmp_path):
    for arguments in verbs(trained, _forget(tmp_path, "cat")):
        assert "forget set is empty: class 2 has no images in the training split" in told(salun(*arguments), 1)


@pytest.mark.parametrize(("name", "near"), [("beer", "bear"), ("CAT", "cat"), (3, "give 0 to 2"), (-1, "give 0 to 2")])
def test_a_misspelt_class_is_met_with_the_nearest(salun, trained, tmp_path, name, near):
    for arguments in verbs(trained, _forget(tmp_path, name)):
        line = told(salun(*arguments), 2)
        assert (f"did you mean {near!r}" if isinstance(name, str) else near) in line


def test_labels_that_went_bad_after_the_training_are_refused(salun, trained, tmp_path):
    parquet(tmp_path / "data" / "train.parquet", [0, 1] * 3 + [0, 7])
    for arguments in verbs(trained, _forget(tmp_path, "ape")):
        assert "row 7 with label 7" in told(salun(*arguments), 1)


@pytest.mark.parametrize(
    ("arch", "code", "why"),
    [
        ("vgg16_bn", 1, "vgg16_bn cannot be built for images of 8 pixels"),
        ("vit_tinny", 2, "did you mean 'vit_tiny'"),
        ("vgg16bn", 2, "did you mean 'vgg16_bn'"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(salun, tmp_path, arch, code, why):
    spec = data(tmp_path / "data", [0, 1, 2], [0, 1, 2])
    assert why in told(salun("train", "--data", spec, "--arch", arch, "--out", "model"), code)


def test_the_list_of_models_names_those_of_the_study(salun):
    result = salun("--json", "ls", "models")
    assert result.exit_code == 0, result.output
    found = {row["model"] for row in json.loads(result.stdout)}
    assert {"resnet18", "resnet20", "resnet56", "vgg16_bn", "swin_t", "vit_tiny"} <= found
