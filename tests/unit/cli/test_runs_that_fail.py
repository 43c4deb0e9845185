"""`salun unlearn` that diverges, budgets that are too small, and names with a typo: one line, and nothing half-made."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open

pytestmark = pytest.mark.slow


@pytest.fixture
def unlearn(salun, world):
    """Runs `salun unlearn` on the digits; what it is told lies outside of the working folder."""

    def run(*more):
        return salun("unlearn", "--model", world.base, "--forget", world.forget_json, "--out", "after", *more)

    return run


def last_line(result, code):
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.splitlines()[-1:] == lines
    return lines[0]


@pytest.mark.usefixtures("untouched")
def test_a_loss_that_is_not_a_number_says_where_and_leaves_no_model(unlearn, world):
    line = last_line(unlearn("--method", "salun", "--mask", world.mask_st, "--set", "learning_rate=1e6"), 1)
    assert "loss of the forget phase is not finite: in epoch 1 of 5" in line
    assert "To fix it: lower the learning rate" in line


def test_the_last_good_checkpoint_is_kept_and_gone_on_from(unlearn, world, tmp_path, monkeypatch):
    """Two steps an epoch: the first epoch survives this rate, the second does not."""
    monkeypatch.setenv("SALUN_CHECKPOINT_DIR", str(tmp_path / "kept"))
    given = "--method", "salun", "--mask", world.mask_st, "--set", "learning_rate=0.3", "--set", "batch_size=2000"
    first = unlearn(*given)
    line = last_line(first, 1)
    epoch = int(re.search(r"phase is not finite: in epoch (\d) of 5", line)[1])
    assert epoch > 1
    [path] = (tmp_path / "kept").iterdir()
    with safe_open(path, "pt") as file:
        header = json.loads(bytes(file.get_tensor("header").numpy()))
        weights = [file.get_tensor(name) for name in file.keys() if name.startswith("model/")]  # noqa: SIM118
    assert len(header["history"]) == epoch - 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)

    kept = path.read_bytes()
    again = unlearn(*given)
    assert last_line(again, 1) == line
    assert "epoch 1 of 5" not in unlearn(*given, "--debug").stderr  # which shows each epoch that runs
    assert path.read_bytes() == kept
    path.unlink()
    assert "epoch 1 of 5" in unlearn(*given, "--debug").stderr
    assert [item.name for item in tmp_path.iterdir()] == ["kept"]


@pytest.mark.usefixtures("untouched")
def test_a_budget_that_is_too_small_says_how_much_the_first_trial_needs(unlearn):
    tune = "--tune", "--set", "epochs=1", "--tune-budget"
    needed = int(re.search(r"it is 10 passes, and the first trial needs (\d+)", last_line(unlearn(*tune, 10), 2))[1])
    assert f"needs {needed}." in last_line(unlearn(*tune, needed - 1), 2)
    assert f"over before the first trial, which needs {needed} passes" in last_line(unlearn(*tune, "0.001s"), 2)
    share = last_line(unlearn(*tune, "0.5e"), 2)
    assert "the budget 0.5e is too small" in share
    assert f"needs {needed}." in share


def test_the_budget_that_it_names_is_enough(unlearn, tmp_path):
    tune = "--tune", "--set", "epochs=1", "--tune-budget"
    needed = re.search(r"the first trial needs (\d+)", last_line(unlearn(*tune, 10), 2))[1]
    done = unlearn(*tune, needed)
    assert done.exit_code in (0, 3)  # what the policy says of one trial is another matter
    assert len([line for line in done.stderr.splitlines() if line.startswith("trial ")]) == 1


@pytest.fixture
def mistyped(tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "p.yaml"
    rule = {"metric": "TAA", "op": ">=", "value": 0.5, "reason": "r"}
    relative = {"metric": "UA", "op": ">=", "relative_to": {"metric": "RAA"}, "reason": "r"}
    path.write_text(json.dumps({"name": "mistyped", "rules": [rule, relative]}))
    return path


@pytest.mark.usefixtures("untouched")
def test_names_with_a_typo_get_the_nearest_one(unlearn, salun, world, mistyped):
    assert "did you mean 'salun'" in last_line(unlearn("--method", "salum"), 2)
    paths = "--before", world.base, "--after", world.after, "--forget", world.forget_json
    assert "did you mean 'probe'" in last_line(
        salun("evaluate", *paths, "--out", "e", "--report", "r", "--extra-metrics", "lira,prob"), 2
    )
    line = last_line(unlearn("--tune", "--policy", mistyped), 2)
    assert "unknown metric in policy mistyped: 'TAA'" in line
    assert "did you mean 'TA'" in line


def test_the_gate_refuses_a_metric_with_a_typo_and_names_the_nearest(salun, world, mistyped, tmp_path):
    result = salun("gate", "--evidence", world.evidence_json, "--policy", mistyped, "--out", "d.json")
    assert result.exit_code == 3
    assert "the evidence has no metric TAA; did you mean 'TA'?" in result.stdout
    assert "its threshold cannot be computed from the evidence: the evidence has no metric RAA" in result.stdout
    assert json.loads((tmp_path / "d.json").read_text())["passed"] is False


def test_a_run_that_finds_no_setting_ends_as_the_gate_refuses(salun, world, store, digits_line, tmp_path):
    rule = {"metric": "RA", "op": ">=", "value": 1.5, "reason": "nobody can"}
    (tmp_path / "strict.json").write_text(json.dumps({"name": "strict", "rules": [rule]}))
    settings = {
        "model_line": digits_line,
        "forget_manifest_uri": str(world.forget_json),
        "policy_uri": "strict.json",
        "method_config": {"epochs": 1},
        "tune": True,
        "tune_budget": "2e",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    result = salun("run", "--config", "run.yaml", "--store", store.uri, "--work-dir", "work")
    line = last_line(result, 3)
    assert "no setting satisfies the policy strict" in line
    assert any(text.startswith("trial 0: ") for text in result.stderr.splitlines())
    assert not (tmp_path / "work" / "after").exists()
    again = salun("run", "--config", "run.yaml", "--store", store.uri, "--set", "extra_metrics=lirra=8", "--dry-run")
    assert "did you mean 'lira'" in last_line(again, 2)
