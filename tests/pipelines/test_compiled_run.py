"""The shipped file, run step by step in processes of their own, on a real store.

A gate that refuses is met in the deletion sweep (test_sweep_run.py), which runs the same steps; a stale parent in
tests/components/test_component_steps.py.
"""

import base64
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.local import LocalRun
from salun_core.config import load
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.registry.lookup import read_version
from tests.pipelines.leaks import artifacts, leaks, references

pytestmark = [pytest.mark.s3, pytest.mark.e2e]
STEPS = ["fetch-model", "compute-mask", "unlearn", "evaluate", "gate-publish", "conclude", "settle-requests"]
ROOT = Path(__file__).resolve().parents[2]


def artifacts_of(run, step):
    """The artifacts that a step handed to Kubeflow, by name."""
    (path,) = run.folder.glob(f"steps/*/*/{step}/executor_output.json")
    listed = json.loads(path.read_text(encoding="utf-8"))["artifacts"]
    return {name: item["artifacts"][0] for name, item in listed.items()}


def test_green_run(trained, tmp_path):
    """One test because the run is long, with new processes: what it published, wrote, logged, and did not show."""
    said, secret = [], {}

    def listen(line):
        said.append(line)
        if "Executing task evaluate" in line:  # mask and new weights are in our store now
            keys = [entry.key for entry in trained.store.list("scratch/") if entry.key.endswith(".safetensors")]
            secret.update({key.split("/")[2]: trained.store.get(key).data for key in keys})

    run = trained.run(tmp_path, listen, forked=False)  # as pods do; in other tests steps and runs are forks
    published(trained, run, said)
    left_its_documents(run)
    handed_its_figures_to_kubeflow(run)
    kept_nothing_that_was_to_be_forgotten(trained, run, secret)


def published(trained, run, said):
    assert (run.exit_code, run.error) == (0, "")
    assert list(run.steps) == STEPS
    assert [line for line in said if "Executing" in line][0] == "Executing task fetch-model (1 of 8)"
    assert run.parent == trained.parent
    assert run.version == trained.head != trained.parent
    manifest = read_version(trained.store, "digits", run.version)
    assert manifest.parent == trained.parent
    assert manifest.forget_count == len(trained.forgotten)
    assert {"model.safetensors", "evidence.json", "decision.json", "report.html"} <= set(manifest.files)
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", manifest.run)


def left_its_documents(run):
    evidence = load(Evidence, run.files["evidence.json"])
    assert evidence.integrity.frozen_changed == 0
    assert load(GateDecision, run.files["decision.json"]).passed
    assert "<html" in run.files["report.html"].read_text(encoding="utf-8")[:200]
    assert not list(run.folder.glob(".tmp-*"))


def handed_its_figures_to_kubeflow(run):
    evidence = load(Evidence, run.files["evidence.json"])
    measured = artifacts_of(run, "evaluate")
    metrics = measured["metrics"]["metadata"]
    for name, metric in evidence.metrics.items():
        assert metrics[f"{name}_after"] == pytest.approx(metric.after)
    rows = measured["classification"]["metadata"]["confusionMatrix"]["rows"]
    assert [row["row"] for row in rows] == evidence.confusion
    curve = measured["classification"]["metadata"]["confidenceMetrics"]
    assert [point["falsePositiveRate"] for point in curve] == evidence.roc["after"].fpr
    assert all(0 <= point["confidenceThreshold"] <= 1 for point in curve)
    for step in ("evaluate", "gate-publish"):
        page = Path(artifacts_of(run, step)["report"]["uri"]).read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>")


def kept_nothing_that_was_to_be_forgotten(trained, run, secret):
    assert set(secret) == {"mask", "model"}
    weights = [(trained.model / "model.safetensors").read_bytes(), *secret.values()]
    assert leaks(run, trained.forgotten, weights) == []
    found = references(run)
    assert set(found) == {
        f"{step}/{name}"
        for step, name in {
            "fetch-model": "inputs",
            "compute-mask": "mask",
            "unlearn": "unlearned",
            "evaluate": "evidence",
            "gate-publish": "decision",
        }.items()
    }
    assert found["evaluate/evidence"].facts["forget_samples"] == len(trained.forgotten)
    assert sum(path.stat().st_size for name, path in artifacts(run).items() if name in found) < 20_000
    assert not list(trained.store.list(f"scratch/{run.run}/"))  # nor does it stay in our store


def test_a_leak_would_be_found(trained, tmp_path, digits_model):
    """The search finds an id, and a piece of a tensor, raw and in base64."""
    place = tmp_path / "steps" / "a" / "b"
    place.mkdir(parents=True)
    (tmp_path / "run.log").write_text("")
    run = LocalRun(tmp_path, files={"run.log": tmp_path / "run.log"})
    weights = (digits_model / "model.safetensors").read_bytes()
    assert leaks(run, trained.forgotten, [weights]) == []
    (place / "one").write_text(f'"{trained.forgotten[0]}"')
    (place / "two").write_bytes(weights[len(weights) // 3 :])
    (place / "three").write_bytes(base64.b64encode(weights))
    assert [text.split(":")[0] for text in leaks(run, trained.forgotten, [weights])] == [
        f"steps/a/b/{name}" for name in ("one", "three", "two")
    ]


def test_wrong_line_is_a_usage_error(trained, tmp_path, forked_runs):
    arguments = trained.arguments(model_line="digitz")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    result = CliRunner().invoke(app, ["run", *options, "--work-dir", str(tmp_path), "--json"])
    assert result.exit_code == 2
    outcome = json.loads(result.stdout)
    assert outcome["exit_code"] == 2
    assert list(outcome["seconds"]) == ["fetch-model", "conclude-2", "settle-requests"]
    assert outcome["outcome"]["state"] == "wrong_input"
    assert "model line digitz has no HEAD" in outcome["error"]
    assert "Error: model line digitz has no HEAD" in result.stderr


@pytest.mark.parametrize(
    ("pipeline", "changes", "message"),
    [
        ("unlearning", {"forget_manifest_uri": None}, "--forget-manifest-uri is missing"),
        ("unlearning", {"min_requests": 1}, "--min-requests is unknown"),
        ("deletion-sweep", {}, "--forget-manifest-uri is unknown"),
        ("deletion-sweeps", {}, "unknown pipeline 'deletion-sweeps'"),
    ],
)
def test_arguments_that_do_not_fit_the_pipeline_are_refused(tmp_path, pipeline, changes, message):
    given = {"model_line": "digits", "store_uri": "s3://salun/none", "forget_manifest_uri": "forget.json", **changes}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    result = CliRunner().invoke(app, ["run", *options, "--pipeline", pipeline, "--work-dir", str(tmp_path / "work")])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_remote_work_dir_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in trained.arguments().items()]
    result = CliRunner().invoke(app, ["run", *options, "--work-dir", "s3://salun/work"])
    assert result.exit_code != 0
    assert "is not a folder of this machine" in str(result.exception)
    assert not list(tmp_path.iterdir())


def processes_of(folder):
    """Ids of the processes whose temporary folder lies in a working folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to look for processes")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupt_ends_all_processes(trained, tmp_path, number, code):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in trained.arguments().items()]
    command = [sys.executable, "-m", "pipelines", "run", *options, "--work-dir", str(tmp_path), "--verbose"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert any("Got executor_input" in line for line in process.stderr)  # the step's own process is at work
        assert len(processes_of(tmp_path)) >= 2
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
        process.stderr.close()
    deadline = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < deadline:  # the system is still cleaning up
        time.sleep(0.05)
    assert processes_of(tmp_path) == []
    assert not list(tmp_path.glob(".tmp-*"))
    assert trained.head == trained.parent
