"""Model folders: strict, whole, and tied to their split."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from salun_core.data.images import Normalisation
from salun_core.data.split import SPLIT, SplitManifest, read_split
from salun_core.errors import IntegrityError, ModelError, StoreError, UsageError
from salun_core.models import ModelCard, build_classifier, load_model, save_model
from salun_core.models.checkpoint import (
    CARD,
    WEIGHTS,
    load_weights,
    model_digest,
    read_weights,
    state_faults,
    write_folder,
)


@pytest.fixture
def card(lab):
    return ModelCard(
        architecture="resnet8",
        classes=[str(index) for index in range(10)],
        channels=1,
        height=8,
        width=8,
        mean=list(lab.train.normalisation.mean),
        std=list(lab.train.normalisation.std),
        data=lab.data.spec,
        dataset_digest=lab.data.split.dataset_digest,
        split_digest=lab.data.split.digest,
        training={"epochs": 6, "nested": {"a": [1, 2.5, None]}},
    )


@pytest.fixture
def folder(tmp_path, lab, card):
    save_model(tmp_path / "model", lab.model, card, lab.data.split)
    return tmp_path / "model"


def test_model_card_and_split_are_unchanged_after_a_round_trip(folder, lab, card):
    loaded = load_model(folder)
    assert loaded.card == card
    assert loaded.split == lab.data.split
    assert loaded.digest == model_digest(lab.model) == model_digest(loaded.model)
    assert loaded.normalisation == lab.train.normalisation
    assert not loaded.model.training
    for name, value in lab.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    inputs, _ = next(lab.test.batches(64))
    assert torch.equal(loaded.model(inputs), lab.model(inputs))
    assert sorted(item.name for item in folder.iterdir()) == sorted([CARD, SPLIT, WEIGHTS])
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_digest_does_not_depend_on_the_memory_layout(lab):
    other = copy.deepcopy(lab.model).to(memory_format=torch.contiguous_format)
    assert model_digest(other) == model_digest(lab.model)
    with torch.no_grad():
        other.fc.bias[0] = torch.nextafter(other.fc.bias[0], torch.tensor(9.0))
    assert model_digest(other) != model_digest(lab.model)


def test_the_card_must_name_the_split(tmp_path, lab, card):
    other = card.model_copy(update={"split_digest": "0" * 64})
    with pytest.raises(IntegrityError, match="split of the model card"):
        save_model(tmp_path / "model", lab.model, other, lab.data.split)
    assert list(tmp_path.iterdir()) == []


def test_another_split_in_the_folder_is_refused(folder):
    document = read_split(folder).model_dump()
    sample = next(iter(document["train"]))
    document["test"][sample] = document["train"].pop(sample)
    SplitManifest.model_validate(document).write(folder / SPLIT)
    with pytest.raises(IntegrityError, match="split in the model folder"):
        load_model(folder)


def test_saving_replaces_a_model_and_nothing_else(folder, lab, card, tmp_path):
    changed = copy.deepcopy(lab.model)
    with torch.no_grad():
        changed.fc.bias.add_(1)
    digest = save_model(folder, changed, card, lab.data.split, {"run.json": b"{}"})
    assert load_model(folder).digest == digest == model_digest(changed)
    assert (folder / "run.json").read_bytes() == b"{}"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    empty = tmp_path / "empty"
    empty.mkdir()
    save_model(empty, lab.model, card, lab.data.split)
    assert load_model(empty).digest == model_digest(lab.model)
    for occupied in (tmp_path / "other", tmp_path / "file"):
        if occupied.name == "other":
            occupied.mkdir()
            (occupied / "thesis.tex").write_text("x")
        else:
            occupied.write_text("x")
        with pytest.raises(UsageError, match="is not empty"):
            save_model(occupied, lab.model, card, lab.data.split)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "x"


def test_a_failed_save_leaves_the_old_model_and_no_other_files(folder, tmp_path, lab):
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    with pytest.raises(StoreError, match="cannot write"):
        write_folder(folder, {CARD: b"{}", "a" * 300: b"x"})
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot write"):
        write_folder(tmp_path / "file" / "model", {CARD: b"{}"})
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "model"]


def test_a_failed_rename_restores_the_old_model(folder, tmp_path, monkeypatch):
    from pathlib import Path

    rename = Path.replace

    def failing(self, target):
        if self.parent == tmp_path and target == folder and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(StoreError, match="No space left"):
        write_folder(folder, {CARD: b"{}"})
    monkeypatch.undo()
    load_model(folder)
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("missing", [CARD, SPLIT, WEIGHTS])
def test_incomplete_folders_are_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=missing):
        load_model(folder)


def test_damaged_weights_are_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    for bad in (b"", b"x" * 100, data[:-1], data + b"x", data[: len(data) // 2]):
        (folder / WEIGHTS).write_bytes(bad)
        with pytest.raises(IntegrityError, match="are damaged"):
            load_model(folder)


def test_a_pickle_in_place_of_the_weights_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Trap:
        def __reduce__(self):
            return os.system, ("touch escaped",)

    torch.save(Trap(), folder / WEIGHTS)
    with pytest.raises(IntegrityError):
        load_model(folder)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"architecture": "resnet8"}', '{"format": "salun.model/v2"}', "\x00", "[" * 5000]
)
def test_broken_cards_are_refused(folder, text):
    (folder / CARD).write_text(text)
    with pytest.raises(UsageError):
        load_model(folder)


def test_all_faults_of_a_card_are_listed(folder):
    document = json.loads((folder / CARD).read_text())
    document |= {"channels": 0, "clases": [], "task": "generation"}
    del document["mean"]
    (folder / CARD).write_text(json.dumps(document))
    with pytest.raises(UsageError) as caught:
        load_model(folder)
    for fault in ("channels", "clases: unknown key, did you mean 'classes'", "task", "mean"):
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"architecture": "resnet14"}, r"missing \d+ of \d+: stages"),
        ({"classes": ["a", "b", "c"]}, r"fc.weight is \[10, 64\], not \[3, 64\]"),
        ({"channels": 3}, r"conv1.weight is \[16, 1, 3, 3\], not \[16, 3, 3, 3\]"),
    ],
)
def test_weights_of_another_architecture_are_refused(folder, change, fault):
    document = json.loads((folder / CARD).read_text()) | change
    (folder / CARD).write_text(json.dumps(document))
    with pytest.raises(ModelError, match=fault):
        load_model(folder)


def test_loading_is_strict_in_both_directions_and_lists_the_faults(lab):
    state = lab.model.state_dict()
    bad = {name: value for name, value in state.items() if name != "fc.bias"}
    bad["extra.weight"] = torch.zeros(2)
    bad["fc.weight"] = torch.zeros(3, 64)
    bad["conv1.weight"] = state["conv1.weight"].half()
    model = build_classifier("resnet8", 10, 1)
    before = model_digest(model)
    with pytest.raises(ModelError) as caught:
        load_weights(model, bad)
    for fault in (
        "missing 1 of 56: fc.bias",
        "unexpected 1: extra.weight",
        "fc.weight is [3, 64], not [10, 64]",
        "conv1.weight is torch.float16, not torch.float32",
    ):
        assert fault in str(caught.value)
    assert model_digest(model) == before
    assert not state_faults(state, state)
    with pytest.raises(ModelError, match=r"missing 56 of 56: stages\.\* \(48\), bn1\.\* \(5\)"):
        load_weights(model, {})


def test_every_name_is_required(lab):
    state = lab.model.state_dict()
    model = build_classifier("resnet8", 10, 1)
    for name in state:
        with pytest.raises(ModelError, match="missing"):
            load_weights(model, {key: value for key, value in state.items() if key != name})
    load_weights(model, state)
    assert model_digest(model) == model_digest(lab.model)


def test_images_must_fit_the_model(folder, lab):
    loaded = load_model(folder)
    loaded.check_images(lab.test.shape, 10)
    with pytest.raises(ModelError, match="3 x 8 x 8, the model takes 1 x 8 x 8"):
        loaded.check_images((3, 8, 8), 10)
    with pytest.raises(ModelError, match="the data have 9 classes, the model 10"):
        loaded.check_images(lab.test.shape, 9)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UsageError, match="there are no weights"):
        read_weights(tmp_path / "absent.safetensors")


def test_weights_are_plain_safetensors(folder, lab, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == lab.model.state_dict().keys()
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    save_file({**tensors, "strange": torch.zeros(1)}, copied / WEIGHTS)
    with pytest.raises(ModelError, match="unexpected 1: strange"):
        load_model(copied)


def test_a_foreign_module_has_a_digest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert len(model_digest(model)) == 64
    assert Normalisation((0.5,), (0.5,)) == Normalisation((0.5,), (0.5,))
