"""The options of `salun run` and `salun sweep`, which are built from the run form."""

from __future__ import annotations

import pytest

FILE = "model_line: a\nforget_manifest_uri: f\nstore_uri: s3://file\ndensity: 0.3\nseed: 7\ntune: true\n"


def test_an_option_overrides_the_file_and_set_overrides_both(form_of, tmp_path):
    (tmp_path / "run.yaml").write_text(FILE)
    words = ("--density", "0.5", "--seed", "8", "--set", "seed=9", "--set", "method_config.epochs=2", "--line", "b")
    form = form_of("run", "--config", "run.yaml", *words)
    assert (form.density, form.seed, form.model_line, form.tune) == (0.5, 9, "b", True)
    assert (form.forget_manifest_uri, form.method_config) == ("f", {"epochs": 2})


def test_the_store_of_the_file_has_priority(form_of, tmp_path):
    (tmp_path / "run.yaml").write_text(FILE)
    assert form_of("run", "--config", "run.yaml", "--store", "s3://option").store_uri == "s3://file"
    (tmp_path / "run.yaml").write_text(FILE.replace("store_uri: s3://file\n", ""))
    assert form_of("run", "--config", "run.yaml", "--store", "s3://option").store_uri == "s3://option"


def test_a_run_needs_no_file(form_of, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", "s3://variable")
    form = form_of("run", "--line", "a", "--forget", "f", "--policy", "ddpm")
    assert (form.model_line, form.store_uri, form.policy_uri) == ("a", "s3://variable", "ddpm")


def test_a_sweep_takes_settings_of_the_method_from_set(form_of):
    words = ("--line", "a", "--store", "s3://s", "--once", "--min-requests", "2", "--set", "epochs=3", "--dry-run")
    form = form_of("sweep", *words)
    assert (form.min_requests, form.method_config, form.dry_run, form.max_requests) == (2, {"epochs": 3}, True, 64)


@pytest.mark.parametrize("words", [("--max-requests", "0"), ("--max-requests", "1001"), ("--density", "1.5")])
def test_a_number_out_of_range_is_a_usage_error(salun, words):
    assert salun("sweep", "--line", "a", "--store", "s3://s", "--once", *words).exit_code == 2
