"""The verbs that begin a diffusion line, on an application of their own."""

import json

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import typer
from typer.testing import CliRunner

from salun_core.cli.models import (
    TrainGroup,
    import_diffusion,
    train_classifier,
    train_ddpm,
    train_stable_diffusion,
)
from salun_core.errors import UsageError
from tests.support.tiny_families import save_raw

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
    app.command("import")(import_diffusion)
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


def test_unknown_setting_is_named(app, tmp_path):
    found = _run(app, "train", "ddpm", "--data", "digits", "--out", tmp_path / "m", "--set", "stepz=3")
    assert isinstance(found.exception, UsageError)
    assert "did you mean 'steps'" in str(found.exception)
