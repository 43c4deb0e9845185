"""The verbs that begin a diffusion line, on an application of their own."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import typer
from typer.testing import CliRunner

from lab.cli.training import train_ddpm, train_stable_diffusion
from salun_core.cli.models import Destination, TrainGroup, import_model, train_classifier
from salun_core.data.split import SPLIT, SplitManifest
from salun_core.errors import ConflictError, UsageError
from salun_core.models.card import DiffusionEvaluation
from salun_core.registry.lookup import read_version, resolve
from tests.support.card_line import classifier_card
from tests.support.memory_store import MemoryFiles
from tests.support.tiny_diffusion import save_raw

SHORT = ["steps=2", "epochs=1", "batch_size=8", "channels=[8,16]", "head_channels=4", "device=cpu"]


@pytest.fixture(scope="module")
def app():
    app, group = typer.Typer(), typer.Typer(cls=TrainGroup)
    for name, verb in {
        "classifier": train_classifier,
        "ddpm": train_ddpm,
        "stable-diffusion": train_stable_diffusion,
    }.items():
        group.command(name)(verb)
    app.add_typer(group, name="train")
    app.command("import")(import_model)
    return app


def _run(app, *args):
    return CliRunner().invoke(app, list(map(str, args)), catch_exceptions=True)


def test_ddpm_is_trained(app, tmp_path):
    sets = [word for text in SHORT for word in ("--set", text)]
    data = tmp_path / "data.yaml"
    data.write_text("source: digits\ntrain_limit: 40\n")
    found = _run(app, "train", "ddpm", "--data", data, "--out", tmp_path / "m", "--judge", "judges@1", *sets)
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "m/model.json").read_text())["evaluation"]["judge"] == "judges@1"


def test_what_the_line_will_lack_is_said_before_training(app, tmp_path, monkeypatch):
    monkeypatch.setattr("lab.checkout.load_example", _stopped_example)
    arguments = ["train", "ddpm", "--data", "digits", "--out", tmp_path / "m", "--evaluation", "images_per_class=20"]
    found = _run(app, *arguments)
    assert found.exception.args == ("training began",)
    lacking = "UA, RA, restored, none_of_these and FID"
    assert f"warning: the line has no image classifier, so {lacking} cannot be measured" in found.stderr
    found = _run(app, *arguments, "--judge", "judges@123456")
    assert (
        "images_per_class is 20, so the rule UA >= 0.85 (low end) can never be shown and the level is" in found.stderr
    )
    assert "no image classifier" not in found.stderr


def _stopped_example(name):
    from examples import small_diffusion

    def stop(*_):
        raise RuntimeError("training began")

    return SimpleNamespace(KINDS=small_diffusion.KINDS, resolve_recipe=small_diffusion.resolve_recipe, train=stop)


def test_an_import_says_what_is_missing_and_its_size(app, tmp_path):
    raw = save_raw("ddpm", tmp_path / "raw")
    found = _run(app, "import", raw, "--out", tmp_path / "m", "--classes", "zero,one")
    assert found.exit_code == 0, found.output
    assert "images      1 x 8 x 8\n" in found.stdout
    assert "warning: the model came without data, so no request can be erased from it" in found.stderr


@pytest.fixture
def judge_folder(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.json").write_text(classifier_card().model_dump_json())
    split = SplitManifest(dataset_digest="d" * 64, train={"a": "0" * 64}, validation={}, test={})
    split.write(folder / SPLIT)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_an_image_classifier_in_a_folder_is_published_with_the_line(judge_folder, monkeypatch):
    store = MemoryFiles()
    monkeypatch.setattr("salun_core.storage.open_store", lambda uri: store)
    asked = DiffusionEvaluation(judge=str(judge_folder))
    to = Destination(judge_folder.parent / "m", "ddpm", "s3://abc")
    named = to.with_judge(asked).judge
    line, digest = resolve(store, named)
    assert (line, read_version(store, line, digest).lineage.trained_on) == ("ddpm-judge", 1)
    assert to.with_judge(asked).judge == named  # a killed command is repeated
    (judge_folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConflictError, match="model line ddpm-judge exists already"):
        to.with_judge(asked)
    assert Destination(judge_folder.parent, None, None).with_judge(asked) == asked


def test_dry_run_writes_nothing(app, tmp_path):
    found = _run(app, "train", "stable-diffusion", "--data", "digits", "--out", tmp_path / "m", "--dry-run")
    assert found.exit_code == 0, found.output
    assert "wrote nothing" in found.output
    assert not (tmp_path / "m").exists()


def test_train_without_a_kind_still_trains_a_classifier(app, tmp_path):
    found = _run(app, "train", "--data", "digits", "--arch", "resnet8", "--out", tmp_path / "m", "--dry-run")
    assert found.exit_code == 0, found.output
    assert "resnet8" in found.output


def test_folder_is_imported(app, tmp_path):
    raw = save_raw("ddpm", tmp_path / "raw")
    arguments = ["import", raw, "--out", tmp_path / "m", "--classes", "zero, one,two", "--evaluation", "steps=5"]
    found = _run(app, *arguments)
    assert found.exit_code == 0, found.output
    card = json.loads((tmp_path / "m/model.json").read_text())
    assert (card["classes"], card["evaluation"]["steps"]) == (["zero", "one", "two"], 5)
    assert card["trainable_text_encoder"] is False


def test_an_import_allows_a_trained_text_encoder_only_if_told(app, tmp_path):
    raw = save_raw("sd1", tmp_path / "raw")
    found = _run(app, "import", raw, "--out", tmp_path / "m", "--trainable-text-encoder")
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "m/model.json").read_text())["trainable_text_encoder"] is True
    (tmp_path / "weights.safetensors").write_bytes(b"")
    refused = _run(app, "import", tmp_path / "weights.safetensors", "--trainable-text-encoder")
    assert "--trainable-text-encoder cannot be used here" in str(refused.exception)


def test_unknown_setting_is_named(app, tmp_path):
    found = _run(app, "train", "ddpm", "--data", "digits", "--out", tmp_path / "m", "--set", "stepz=3")
    assert isinstance(found.exception, UsageError)
    assert "did you mean 'steps'" in str(found.exception)
