"""`salun audit` on model folders and weights: the model of the digits before, and cheap changes of it after."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from salun_core.models import build_classifier, load_model
from salun_core.models.checkpoint import WEIGHTS, save_model
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digits_model):
    """The model before; one with an edited bias; one that knows nothing; one of another architecture; targets."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "before").symlink_to(digits_model)
    before = load_model(digits_model)
    state = load_file(digits_model / WEIGHTS)
    (bias,) = [name for name, tensor in state.items() if tensor.shape == (10,) and name.endswith("bias")]
    shutil.copytree(digits_model, folder / "edited")
    state[bias][3] -= 100
    save_file(state, folder / "edited" / WEIGHTS)
    ids = sorted(before.split.train)[:60]
    split = before.split.without(ids)
    for name, architecture in (("fresh", "resnet8"), ("wider", "resnet14")):
        network = build_classifier(architecture, 10, before.card.channels, before.card.height)
        changed = {"architecture": architecture, "split_digest": split.digest}
        save_model(folder / name, network, before.card.model_copy(update=changed), split)
    (folder / "class.json").write_text(json.dumps({"kind": "class", "class_id": 3}))
    (folder / "ids.txt").write_text("\n".join(ids))
    return folder


def audit(folders, out, *more, after="edited", forget="class.json"):
    paths = ("--before", folders / "before", "--after", folders / after, "--forget", folders / forget)
    return invoke("audit", *paths, "--out", out / "audit.json", *more)


def test_an_edited_bias_is_found_in_the_features(folders, tmp_path):
    result = audit(folders, tmp_path, "--json")
    assert result.exit_code == 3
    evidence = json.loads(result.stdout)
    verdicts = {found["test"]: found["verdict"] for found in evidence["findings"]}
    assert verdicts["recognised"] == "pass"
    assert verdicts["restored"] == verdicts["own_logit"] == verdicts["change"] == "fail"
    assert evidence["source"] == "models"
    assert evidence["sizes"]["classes"] == [3]
    after = {item["name"]: item["sha256"] for item in evidence["inputs"] if item["role"] == "after"}
    assert set(after) == {path.name for path in (folders / "edited").iterdir()}
    assert {item["role"] for item in evidence["inputs"]} == {"before", "after", "forget", "data"}


def test_single_samples_are_relearned_and_references_and_shadow_models_are_used(folders, tmp_path):
    result = audit(folders, tmp_path, "--reference", folders / "fresh", "--json", forget="ids.txt")
    found = {item["test"] for item in json.loads(result.stdout)["findings"]}
    assert found == {"attack", "outputs", "change", "accuracy", "relative", "relearn"}
    refused = audit(folders, tmp_path, "--shadow", folders / "fresh", forget="ids.txt")
    assert "left out by fewer than 2 of 1 models" in refused.stderr


def test_weights_are_read_with_the_data_that_are_named(folders, tmp_path):
    for name in ("before", "edited"):
        shutil.copy(folders / name / WEIGHTS, tmp_path / f"{name}.safetensors")
    paths = ("--before", tmp_path / "before.safetensors", "--after", tmp_path / "edited.safetensors")
    words = ("audit", *paths, "--forget", folders / "class.json", "--out", tmp_path / "audit.json")
    assert "give --data" in invoke(*words).stderr
    result = invoke(*words, "--data", "digits", "--json")
    assert result.exit_code == 3, result.stderr
    roles = {item["role"]: item["name"] for item in json.loads(result.stdout)["inputs"]}
    assert (roles["before"], roles["after"]) == ("before.safetensors", "edited.safetensors")


def test_a_link_to_weights_is_refused_because_it_is_not_hashed(folders, tmp_path):
    shutil.copytree(folders / "edited", tmp_path / "linked")
    (tmp_path / "linked" / WEIGHTS).unlink()
    (tmp_path / "linked" / WEIGHTS).symlink_to(folders / "edited" / WEIGHTS)
    result = audit(folders, tmp_path, after=tmp_path / "linked")
    assert (result.exit_code, "holds more than regular files" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("more", "words", "code"),
    [
        (("--reference", "wider"), "has another architecture than the model before", 1),
        (("--reference", "edited"), "is the same model as", 1),
        (("--reference", "fresh"), "was trained on the forget set", 1),  # it saw the class
        (("--reference", "nowhere"), "there is no model", 2),
        (("--held-out", "ids.txt"), "--held-out is for predictions", 2),
    ],
)
def test_models_that_do_not_fit_are_refused(folders, tmp_path, more, words, code):
    result = audit(folders, tmp_path, more[0], folders / more[1])
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
    assert not (tmp_path / "audit.json").exists()
