"""`salun unlearn --tune`: what it shows, and its exit codes."""

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def forget(tmp_path):
    path = tmp_path / "forget.json"
    path.write_text(json.dumps({"kind": "class", "class_id": 3}))
    return path


def tune(salun, model, forget, *more):
    settings = ("--set", "batch_size=64", "--set", "epochs=2")
    return salun("unlearn", "--model", model, "--forget", forget, "--out", "after", "--tune", *settings, *more)


def policy(path, least):
    rule = {"metric": "RA", "op": ">=", "value": least, "reason": "what is kept must still be known"}
    path.write_text(json.dumps({"format": "salun.policy/v1", "name": "kept", "rules": [rule]}))
    return path


def test_a_line_a_trial_and_what_was_chosen(salun, digits_model, forget, tmp_path):
    done = tune(salun, digits_model, forget, "--tune-budget", "6e", "--policy", policy(tmp_path / "kept.yaml", 0.9))
    assert done.exit_code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("trial ")]
    assert lines[0].startswith("trial 0: salun, learning_rate 0.003, order sequential, batch_norm freeze, density 0.5")
    assert "distance" in lines[0]
    assert "tuning.json" in done.stdout
    log = json.loads((tmp_path / "after" / "tuning.json").read_text())
    assert len(log["trials"]) == len(lines)


def test_the_exit_code_of_a_refusal_is_3(salun, digits_model, forget, tmp_path):
    done = tune(salun, digits_model, forget, "--tune-budget", "2e", "--policy", policy(tmp_path / "kept.yaml", 1.5))
    assert done.exit_code == 3
    assert "no setting satisfies the policy kept" in done.stderr
    assert "breaks RA >= 1.5" in done.stderr
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mask", "mask.safetensors"), "--tune and --mask cannot be used together"),
        (("--processes", "2"), "--tune uses one process"),
        (("--method", "retrain"), "retrain is not tuned"),
        (("--method", "salun,scrub", "--set", "retain_weight=0.9"), "retain_weight: unknown key"),
        (("--method", "salun_adaptive"), "salun_adaptive is not tuned"),
        (("--policy", "clasifier"), "did you mean 'classifier'"),
        (("--tune-budget", "many"), "is not a budget"),
        (("--tune-budget", "10"), "is too small"),
    ],
)
def test_what_a_search_cannot_do_is_a_usage_error(salun, digits_model, forget, tmp_path, more, message):
    done = tune(salun, digits_model, forget, *more)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "after").exists()


def test_auto_without_a_search_is_a_usage_error(salun, digits_model, forget, tmp_path):
    done = salun("unlearn", "--model", digits_model, "--forget", forget, "--out", "after", "--method", "auto")
    assert done.exit_code == 2
    assert "the method auto needs a search: only a search chooses a method" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_measurements_are_checked_before_any_work(salun):
    paths = ("--before", "nowhere", "--after", "nowhere", "--forget", "f", "--out", "e", "--report", "r")
    done = salun("evaluate", *paths, "--extra-metrics", "lira=5")
    assert done.exit_code == 2
    assert "even number of at least 4" in done.stderr
