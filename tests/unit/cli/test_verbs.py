"""Each verb on real digits: what it writes, what it prints, and what a dry run leaves alone."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from salun_core.config import load
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.models import load_model
from salun_core.saliency import SaliencyMask

pytestmark = pytest.mark.slow


def _json(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_whole_way_forgets_a_class_and_passes_the_gate(salun, world):
    result = salun("gate", "--evidence", world.evidence_json, "--out", "decision.json")
    assert result.exit_code == 0, result.stdout + result.stderr
    evidence = load(Evidence, world.evidence_json)
    assert evidence.metrics["UA"].before == 0
    assert evidence.metrics["UA"].after > 0.95
    assert evidence.integrity.frozen_changed == 0
    assert "PASSED by policy classifier" in result.stdout


def test_mask_prints_what_it_wrote(salun, world):
    made = _json(salun("--json", "mask", "--model", world.base, "--forget", world.forget_json, "--out", "m.st"))
    mask = SaliencyMask.load("m.st")
    assert made["digest"] == mask.digest
    assert made["salient"] == mask.k == round(0.5 * mask.weights)


def test_a_random_mask_is_drawn_by_its_seed(salun, world):
    def digest(seed):
        args = ("--model", world.base, "--forget", world.forget_json, "--density", 0.3, "--out", "m.st")
        return _json(salun("mask", *args, "--random-seed", seed, "--json"))["digest"]

    assert digest(1) == digest(1) != digest(2)


@pytest.mark.parametrize("method", ["finetune", "random_label", "gradient_ascent"])
def test_a_method_without_a_mask_needs_none(salun, world, method):
    args = ("--model", world.base, "--forget", world.forget_json, "--out", "new", "--set", "epochs=1", "--json")
    made = _json(salun("unlearn", "--method", method, *args))
    assert made["epochs"] == 1
    assert load_model(world.folder.__class__("new")).card.parent == load_model(world.base).digest


def test_settings_of_a_file_are_overridden_on_the_command_line(salun, world, tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nlearning_rate: 0.02\n")
    args = ("--model", world.base, "--forget", world.forget_json, "--mask", world.mask_st, "--out", "new")
    made = _json(salun("unlearn", "--method", "salun", *args, "--config", "c.yaml", "--set", "epochs=1", "--json"))
    facts = json.loads((tmp_path / "new" / "run.json").read_text())
    assert made["epochs"] == 1
    assert facts["config"]["learning_rate"] == 0.02


def test_the_same_seed_gives_the_same_weights(salun, world, tmp_path):
    args = ("--model", world.base, "--forget", world.forget_json, "--mask", world.mask_st, "--set", "epochs=1")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert salun("unlearn", "--method", "salun", *args, "--seed", seed, "--out", name).exit_code == 0
    a, b, c = (load_model(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_evaluate_takes_a_reference_that_was_retrained_before(salun, world):
    salun("unlearn", "--method", "retrain", "--model", world.base, "--forget", world.forget_json, "--out", "again",
          "--set", "epochs=2", "--set", "learning_rate=0.1")  # fmt: skip
    args = ("--before", world.base, "--after", world.after, "--forget", world.forget_json, "--mask", world.mask_st)
    out = ("--out", "e.json", "--report", "r.html", "--json")
    evidence = _json(salun("evaluate", *args, "--reference", "again", *out))
    assert evidence["metrics"]["UA"]["reference"] is not None
    assert evidence["metrics"]["gap"]["after"] is not None


def test_report_shows_the_verdict(salun, world, tmp_path):
    salun("gate", "--evidence", world.evidence_json, "--out", "decision.json")
    result = salun("report", "--evidence", world.evidence_json, "--decision", "decision.json", "--out", "r.html")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "r.html").read_text()
    assert load(GateDecision, tmp_path / "decision.json").policy_digest[:12] in page


def test_gate_compares_digests_with_the_artifacts(salun, world):
    given = ("--before", world.base, "--after", world.after, "--mask", world.mask_st, "--forget", world.forget_json)
    result = salun("gate", "--evidence", world.evidence_json, "--out", "d.json", *given, "--json")
    rules = {verdict["rule"]: verdict["passed"] for verdict in _json(result)["verdicts"]}
    names = ("before", "after", "mask", "forget_set", "split", "dataset")
    assert {f"{name} digest": True for name in names}.items() <= rules.items()


def test_a_line_is_begun_run_and_told(salun, world, store, tmp_path):
    weights, rest = world.base / "model.safetensors", ("--arch", "resnet8", "--data", "digits", "--out", "imported")
    first = _json(salun("model", "import", weights, *rest, "--line", "digits", "--store", store.uri, "--json"))
    assert first["digest"] == load_model(world.base).digest
    (tmp_path / "run.yaml").write_text(f"model_line: digits\nforget_manifest_uri: {world.forget_json}\n")
    result = salun("run", "--config", "run.yaml", "--store", store.uri, "--json")
    assert "unlearn ended: forgotten: the forget set looks like unseen data" in result.stderr
    ran = _json(result)
    assert ran["decision"]["passed"]
    told = _json(salun("model", "history", "digits", "--store", store.uri, "--json"))
    assert [item["version"] for item in told] == [ran["version"], first["version"]]
    assert [item["lineage"]["runs_since_training"] for item in told] == [1, 0]
    (tmp_path / "next.json").write_text('{"kind": "class", "class_id": 4}')  # of class 3 nothing is left
    masked = salun("mask", "--model", "digits@HEAD", "--store", store.uri, "--forget", "next.json", "--out", "m")
    assert masked.exit_code == 0, masked.stderr


def test_a_model_is_named_by_its_address_too(salun, world, store):
    rest = ("--arch", "resnet8", "--data", "digits", "--out", "imported", "--line", "digits", "--store", store.uri)
    made = _json(salun("model", "import", world.base / "model.safetensors", *rest, "--json"))
    reference = f"{store.uri}/digits@{made['version'][:12]}"
    masked = salun("mask", "--model", reference, "--forget", world.forget_json, "--out", "m")
    assert masked.exit_code == 0, masked.stderr


def test_request_is_a_group_of_the_command(salun, store, digits_line):
    filed = salun("request", "submit", "--id", "r-1", "--line", "digits", "--class", "3", "--store", store.uri)
    assert filed.exit_code == 0, filed.stderr
    listed = _json(salun("request", "list", "--store", store.uri, "--json"))
    assert [row["id"] for row in listed] == ["r-1"]


def test_doctor_puts_the_store_to_the_test(salun, real_store):
    checks = {item["name"]: item for item in _json(salun("doctor", "--store", real_store.uri, "--json"))}
    assert checks["store"]["state"] == "ok"
    assert checks["store"]["detail"].startswith(real_store.uri)
    assert {"python", "torch", "device", "threads", "disk", "kfp", "embedded S3", "container engine"} <= checks.keys()


def test_doctor_fails_where_the_gateway_is_named_and_gone(salun, monkeypatch):
    monkeypatch.setenv("PUSHGATEWAY_URL", "http://127.0.0.1:9")
    result = salun("doctor")
    assert result.exit_code == 1
    assert "failed: pushgateway" in result.stdout


def test_ls_names_every_method(salun):
    from salun_core.methods import classification as unlearn
    from salun_core.methods import diffusion

    rows = [(row["model"], row["method"]) for row in _json(salun("ls", "methods", "--json"))]
    assert [method for model, method in rows if model == "classifier"] == list(unlearn.METHODS)
    assert [method for model, method in rows if model == "diffusion"] == list(diffusion.METHODS)
    assert "resnet8" in salun("ls", "models").stdout
    assert "digits" in salun("ls", "data").stdout


def _dry_runs(world, store):
    model, forget = ("--model", world.base), ("--forget", world.forget_json)
    weights = world.base / "model.safetensors"
    line = ("--line", "new", "--store", store.uri)
    return [
        ("mask", *model, *forget, "--out", "m.st"),
        ("unlearn", *model, *forget, "--mask", world.mask_st, "--out", "new"),
        ("evaluate", "--before", world.base, "--after", world.after, *forget, "--out", "e", "--report", "r"),
        ("gate", "--evidence", world.evidence_json, "--out", "d"),
        ("report", "--evidence", world.evidence_json, "--out", "r"),
        ("train", "--data", "digits", "--arch", "resnet8", "--out", "base", *line),
        ("model", "import", weights, "--data", "digits", "--arch", "resnet8", "--out", "base", *line),
    ]


@pytest.mark.parametrize("place", range(7))
def test_a_dry_run_writes_nothing(salun, world, store, untouched, place):
    args = _dry_runs(world, store)[place]
    shown = salun(*args, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    assert "wrote nothing" in shown.stdout
    assert _json(salun(*args, "--dry-run", "--json"))["dry_run"] is True
    assert list(store.list("")) == []


def test_a_dry_run_of_run_publishes_nothing(salun, world, store):
    from salun_core.tasks import register_model

    register_model(store, "digits", world.base, "import", 1)
    before = {entry.key for entry in store.list("")}
    settings = ("--set", "model_line=digits", "--set", f"forget_manifest_uri={world.forget_json}")
    assert _json(salun("run", *settings, "--store", store.uri, "--dry-run", "--json"))["would_publish"] == "digits"
    assert {entry.key for entry in store.list("")} == before


def test_the_demo_needs_a_checkout(salun, tmp_path, monkeypatch):
    monkeypatch.setattr("lab.checkout._CHECKOUT", tmp_path)
    refused = salun("demo-diffusion", "--kind", "ddpm")
    assert refused.exit_code == 2
    assert "the example demo is not installed: examples are part of the source repository only" in refused.stderr


def test_the_demo_takes_its_options_and_those_of_every_verb(salun, tmp_path):
    shown = salun("demo-diffusion", "--kind", "ddpm", "--data", "digits", "--dry-run", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["kind"] == "ddpm"
    assert "--serve" in salun("demo", "--help").stdout
    assert salun("demo", "--data", "no/where").exit_code == 2
    assert "No such option: --modle" in salun("demo", "--modle").stderr


HEAVY = ("torch", "diffusers", "boto3", "sklearn", "matplotlib", "structlog", "rich.table")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom salun_core.cli.app import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert 'unlearn' in result.stdout\n"
        "result = CliRunner().invoke(app, ['mask', '--help'])\nassert 'Example' in result.stdout\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_json_and_debug_may_stand_anywhere(salun):
    texts = {
        salun(*args).stdout for args in (("--json", "ls", "data"), ("ls", "--json", "data"), ("ls", "data", "--json"))
    }
    assert len(texts) == 1
    json.loads(texts.pop())
    assert "Traceback" in salun("mask", "--debug", "--model", "no", "--forget", "no", "--out", "m").stderr


def test_debug_logs_no_request_that_could_be_replayed(salun, real_store, monkeypatch):
    from salun_core.storage.keys import head_key

    real_store.put_new(head_key("broken"), b"no JSON")
    monkeypatch.setattr(logging.getLogger("botocore"), "level", logging.DEBUG)  # as with boto3.set_stream_logger
    result = salun("model", "history", "broken", "--debug", "--store", real_store.uri)
    assert result.exit_code == 5
    assert "Traceback" in result.stderr
    for text in ("Signature=", "Authorization", "AWS4-HMAC-SHA256", "botocore."):
        assert text not in result.stderr, text
