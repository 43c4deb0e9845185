"""The import of a classifier with its data: order of the classes, normalisation, size, accuracy, own architectures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from salun_core.data import DataSpec, load_data
from salun_core.errors import ModelError, UsageError
from salun_core.models import build_classifier, load_model
from salun_core.tasks.classification.training import import_model
from tests.support.commands import invoke

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def photos(tmp_path):
    """Images of one colour in class folders; each is a little different."""
    for name, colour in COLOURS.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(10):
            pixels = np.full((8, 8, 3), colour, np.uint8)
            pixels[0, 0] = number
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return DataSpec(source=str(tmp_path / "photos"))


class Colours(nn.Module):
    """Answers with the strongest channel; its outputs are red, green and blue."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.order = nn.Linear(3, num_classes, bias=False)
        with torch.no_grad():
            self.order.weight.copy_(torch.eye(num_classes, 3))

    def forward(self, images):
        return self.order(images.mean((2, 3)))


COLOURS_NAME = "tests.unit.tasks.test_classifier_importing:Colours"


@pytest.fixture
def colours(tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_PLUGINS", COLOURS_NAME)
    torch.save({"model_state_dict": Colours().state_dict()}, tmp_path / "colours.pt")
    return tmp_path / "colours.pt"


SCALE = {"mean": [0.0] * 3, "std": [1.0] * 3}


def test_class_names_give_the_data_the_order_of_the_model(tmp_path, photos, colours):
    made = import_model(colours, photos, COLOURS_NAME, tmp_path / "a", **SCALE)
    assert made.test_accuracy == pytest.approx(1 / 3)  # blue and red are confused
    made = import_model(colours, photos, COLOURS_NAME, tmp_path / "b", **SCALE, classes=["red", "green", "blue"])
    assert (made.test_accuracy, made.train_accuracy) == (1, 1)
    loaded = load_model(tmp_path / "b")
    assert loaded.card.classes == ["red", "green", "blue"]
    again = load_data(loaded.card.data, loaded.split)  # as each later step reads them
    rows = zip(again.table.ids, again.table.labels, strict=True)
    assert all(again.table.classes[label] == sample.split("/")[0] for sample, label in rows)


def test_class_names_that_do_not_fit_are_refused_if_given_and_reported_if_found(tmp_path, photos):
    from safetensors.torch import save_file

    with pytest.raises(ModelError, match="'pink' is not one of the data"):
        _import_resnet(tmp_path, photos, classes=["red", "green", "pink"])
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(dict(build_classifier("timm:mobilenetv3_small_050", 3).state_dict()), folder / "model.safetensors")
    scale = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 32, 32]}
    config = {"architecture": "mobilenetv3_small_050", "pretrained_cfg": scale, "label_names": ["x", "y", "z"]}
    (folder / "config.json").write_text(json.dumps(config))
    made = import_model(folder, photos, None, tmp_path / "out")
    assert "those of config.json differ (such as 'x')" in made.facts["class_names"]
    assert made.facts["normalisation"] == "mean 0.1,0.2,0.3, std 0.5,0.5,0.5, from config.json"
    card = load_model(tmp_path / "out").card
    assert (card.mean, card.height, card.data.size) == ([0.1, 0.2, 0.3], 32, 32)


def _import_resnet(tmp_path, spec, **given):
    torch.save(build_classifier("resnet8_option_a", 3, 3).state_dict(), tmp_path / "m.pt")
    return import_model(tmp_path / "m.pt", spec, None, tmp_path / "resnet", **given)


def test_data_that_number_their_classes_themselves_keep_the_numbers(tmp_path):
    names = [str(number) for number in range(9, -1, -1)]  # the digits' own order is 0 to 9
    torch.save(build_classifier("resnet8", 10, 1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="output 0 is '9', class 0 of the data '0'"):
        import_model(tmp_path / "m.pt", DataSpec(source="digits"), None, tmp_path / "out", classes=names)
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes_is_refused_before_anything_is_written(tmp_path):
    torch.save(build_classifier("resnet8", 7, 1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="it has 7 outputs, the data have 10 classes"):
        import_model(tmp_path / "m.pt", DataSpec(source="digits"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Wrong(nn.Module):
    """Returns something that is not logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return {"logits": images.mean((2, 3))}


def test_a_network_that_returns_no_logits_is_refused(tmp_path, photos, monkeypatch):
    name = "tests.unit.tasks.test_classifier_importing:Wrong"
    monkeypatch.setenv("SALUN_PLUGINS", name)
    torch.save(Wrong().state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        ModelError, match="returns no logits for the 3 classes of the data: for two images it returns dict"
    ):
        import_model(tmp_path / "m.pt", photos, name, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_package:net", "neither installed nor in the working folder.*in a pod, the image must contain it"),
        ("tests.unit.tasks.test_classifier_importing:Missing", "has no Missing"),
        ("tests.unit.tasks.test_classifier_importing:broken", "cannot be built: ValueError: no"),
        ("tests.unit.tasks.test_classifier_importing:number", "it returns a int"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_explained(monkeypatch, name, why):
    monkeypatch.setenv("SALUN_PLUGINS", name)
    with pytest.raises((UsageError, ModelError), match=why):
        build_classifier(name, 3)


def broken():
    raise ValueError("no")


def number():
    return 3


def test_a_card_cannot_choose_code_to_run(tmp_path, photos, colours, monkeypatch):
    import_model(colours, photos, COLOURS_NAME, tmp_path / "model", **SCALE)
    card = json.loads((tmp_path / "model/model.json").read_text())
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nNet = None\n")
    (tmp_path / "model/model.json").write_text(json.dumps({**card, "architecture": "evil:Net"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="architecture evil:Net is not allowed: it is a plug-in"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_an_own_architecture_serves_later_commands(tmp_path, photos, monkeypatch):
    """The package lies in the working folder; the verb that names it allows it, later ones need the variable."""
    monkeypatch.setenv("SALUN_PLUGINS", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n\n\ndef small(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    torch.save({"2.weight": torch.eye(3), "2.bias": torch.zeros(3)}, "small.pt")
    words = ("--arch", "my_nets:small", "--data", photos.source, "--mean", "0,0,0", "--std", "1,1,1", "--out", "m")
    shown = invoke("model", "import", "small.pt", *words, "--classes", "red,green,blue")
    assert shown.exit_code == 0, shown.stderr
    assert "export SALUN_PLUGINS=my_nets:small" in shown.stderr
    assert "test accuracy   1.0000" in shown.stdout
    (tmp_path / "f.json").write_text('{"kind": "class", "class_name": "red"}')
    monkeypatch.setenv("SALUN_PLUGINS", "")
    refused = invoke("mask", "--model", "m", "--forget", "f.json", "--out", "mask")
    assert (refused.exit_code, "set SALUN_PLUGINS=my_nets:small" in refused.stderr) == (2, True)
    monkeypatch.setenv("SALUN_PLUGINS", "my_nets:small")
    masked = invoke("mask", "--model", "m", "--forget", "f.json", "--out", "mask")
    assert masked.exit_code == 0, masked.stderr


def test_a_checkpoint_is_described_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = build_classifier("resnet8_option_a", 4)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, "m.th")
    found = json.loads(invoke("model", "import", "m.th", "--dry-run", "--json").stdout)
    assert found == {
        "dry_run": True,
        "layout": "salun",
        "architecture": "resnet8_option_a",
        "classes": 4,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "wrapper": "state_dict",
        "prefix": "module.",
    }
    refused = invoke("model", "import", "m.th", "--out", "m")
    assert "give --data, or --dry-run to see what the checkpoint is" in refused.stderr
    refused = invoke("model", "import", "m.th", "--out", "m", "--prompt", "a {label}", "--judge", "j")
    assert "--prompt and --judge cannot be used here: this is a classifier" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.th"]


def test_a_dry_run_with_data_measures_and_warns(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("SALUN_PLUGINS", COLOURS_NAME)
    monkeypatch.chdir(tmp_path)
    torch.save(Colours().state_dict(), "m.pt")
    words = ("model", "import", "m.pt", "--data", photos.source, "--arch", COLOURS_NAME, "--mean", "0,0,0", "--dry-run")
    wrong = invoke(*words, "--std", "1,1,1")
    assert wrong.exit_code == 0, wrong.stderr
    assert "warning: the test accuracy is near chance; check --mean and --std, --classes" in wrong.stderr
    right = invoke(*words, "--std", "1,1,1", "--classes", "red,green,blue", "--out", "m", "--json")
    found = json.loads(right.stdout)
    assert (found["test_accuracy"], found["would_write"], found["layout"]) == (1, "m", "your own")
    assert right.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "photos"]


def test_a_refusal_lists_every_tensor_with_json_and_debug(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.ones(2), "fc.weight": torch.ones(2, 2)}, "m.pt")
    words = ("model", "import", "m.pt", "--arch", "resnet8", "--dry-run")
    listed = json.loads(invoke(*words, "--json").stdout)
    assert (len(listed["missing"]), listed["unexpected"]) == (46, ["a.weight"])
    assert "missing: stages.0.0.conv1.weight" in invoke(*words, "--debug").stderr
    assert len(invoke(*words).stderr.strip().splitlines()) == 1


def test_one_line_about_a_faulty_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(build_classifier("resnet8", 10, 1).state_dict(), "m.pt")
    cases = {
        ("--classes", "a"): "neither a file nor a list",
        ("--mean", "0.5"): "give 1 means and 1 deviations above 0",
        ("--key", "ema"): "m.pt has no key 'ema'",
    }
    for words, why in cases.items():
        result = invoke("model", "import", "m.pt", "--data", "digits", "--out", "m", *words)
        assert result.exit_code in (1, 2)
        assert why in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt"]


def test_a_checkpoint_that_is_absent_is_named():
    assert "there is no checkpoint absent.pt" in invoke("model", "import", "absent.pt", "--out", "m").stderr
