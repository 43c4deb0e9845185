"""What `salun doctor` says of a line, its data, its policy, and each kind of request."""

from __future__ import annotations

import json
import re

import pytest

from salun_core import doctor
from salun_core.certificates.keys import create_key
from salun_core.data import load_data
from salun_core.data.spec import DataSpec
from salun_core.data.split import SplitManifest
from salun_core.doctor import Check, Project, check_project
from tests.support.card_line import CLASSES, begin, classifier_card, text_to_image_card
from tests.support.memory_store import MemoryFiles

DIGITS = DataSpec(source="digits", train_limit=200)
NAMES = ["line", "data", "policy", "signing key"]
NAMES += [f"request: {kind}" for kind in ("class", "samples", "subject", "random", "concept")]


@pytest.fixture(scope="module")
def digits():
    return load_data(DIGITS)


@pytest.fixture
def store(monkeypatch, digits):
    found = MemoryFiles()
    card = classifier_card(tuple(digits.table.classes)).model_copy(update={"data": DIGITS})
    begin(found, "digits", card, digits.split)
    changed = {**digits.split.train, next(iter(digits.split.train)): "0" * 64}
    begin(found, "other", card, SplitManifest.model_validate({**digits.split.model_dump(), "train": changed}))
    begin(found, "ddpm", text_to_image_card(CLASSES, {"source": "digits"}))
    begin(found, "sd", text_to_image_card(CLASSES, None, judge="digits"))
    monkeypatch.setattr(doctor, "_opened", lambda uri: found)
    monkeypatch.delenv("SALUN_SIGNING_KEY", raising=False)
    return found


def checked(line, **fields):
    checks = list(check_project("s3://abc", Project(line, **fields), store_works=True))
    assert [check.name for check in checks] == NAMES[: len(checks)]
    return {check.name: check for check in checks}


def states(checks):
    return {name: check.state for name, check in checks.items()}


def test_a_whole_line_can_forget_what_its_data_name(store):
    checks = checked("digits")
    assert states(checks) == dict(
        zip(NAMES, ["ok", "ok", "ok", "absent", "ok", "ok", "absent", "ok", "absent"], strict=True)
    )
    assert "as the line was trained on" in checks["data"].detail
    assert checks["request: subject"].detail == "not possible: the data have no subject column"
    assert checks["request: concept"].detail.startswith("not possible: a classifier has no prompts")
    assert re.match(r"classifier: \d+ rules on RA, TA", checks["policy"].detail)


def test_data_that_differ_from_the_split_stop_every_request(store):
    found = checked("other")
    assert found["data"].state == "failed"
    assert {found[f"request: {kind}"].state for kind in ("class", "samples", "random")} == {"failed"}


def test_moved_data_are_looked_for_where_the_settings_say(store):
    assert checked("digits", data="/no-such-folder/images")["data"].detail.startswith("there is no data at")


def test_an_unknown_line_names_the_nearest(store):
    (check, *_) = check_project("s3://abc", Project("digit"), store_works=True)
    assert (check.state, "did you mean 'digits'?" in check.remedy) == ("failed", True)


def test_a_diffusion_line_without_a_classifier_says_so_by_kind(store):
    checks = checked("sd", policy="stable-diffusion")
    assert checks["data"].state == "absent"
    assert checks["request: class"].detail.endswith("only concepts can be forgotten")
    assert checks["request: samples"].detail.startswith("not possible: a diffusion model forgets")
    concept = checks["request: concept"]
    assert concept.state == "failed"
    assert "the model came without data, so none_of_these and FID cannot be measured" in concept.detail
    assert "the image classifier does not know" in concept.detail


def test_a_policy_that_needs_an_extra_metric(store, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\nrules: [{metric: lira_tpr, op: '<=', value: 0.1, targets: [samples], reason: a}]\n")
    checks = checked("digits", policy=str(path))
    assert checks["request: samples"].state == checks["request: random"].state == "failed"
    assert checks["request: samples"].remedy == "set extra_metrics=lira"
    assert checks["request: class"].detail == "policy own has no rule for it, so the gate refuses"
    asked = checked("digits", policy=str(path), extra_metrics="lira=16")
    assert asked["request: samples"].state == "ok"


def test_a_policy_that_cannot_be_read(store):
    checks = checked("digits", policy="clasifier")
    assert (checks["policy"].state, checks["request: class"].state) == ("failed", "failed")
    assert "'classifier'" in checks["policy"].remedy


def test_the_signing_key(store, monkeypatch, tmp_path):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(tmp_path / "none.pem"))
    assert checked("digits")["signing key"].state == "failed"
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "a").private))
    assert checked("digits")["signing key"].state == "ok"


def test_a_store_that_failed_is_not_asked_again():
    (check, *_) = check_project("s3://abc", Project("digits"), store_works=False)
    assert (check.state, check.detail) == ("failed", "digits: the store cannot be read")


def test_the_command_takes_the_line_from_the_settings_and_fails_if_a_row_does(salun, store, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "run_checks", lambda *_: [Check(name="store", state="ok", detail="")])
    settings = tmp_path / "salun.yaml"
    settings.write_text("store: s3://abc\nline: digits\n")
    result = salun("doctor", "--json")
    assert result.exit_code == 0, result.stdout
    assert [row["name"] for row in json.loads(result.stdout)] == ["settings", "store", *NAMES]
    settings.write_text("store: s3://abc\nline: ddpm\n")
    result = salun("doctor")
    assert result.exit_code == 1
    assert "request: class" in result.stdout.splitlines()[-1]
    assert "give one with --judge when the model is trained or imported" in result.stdout
