"""The shipped files are what the source compiles to, in every environment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines import compile as compiling
from pipelines import packages
from pipelines.cli import app
from pipelines.local import for_this_machine
from salun_core.errors import IntegrityError

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).resolve().parents[2]
PRINT_TEXT = "from pipelines.compile import compile_all; print(''.join(item.text for item in compile_all()))"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the files that ship, to be changed by a test."""
    shutil.copytree(packages.COMPILED, tmp_path / "compiled")
    monkeypatch.setattr(packages, "COMPILED", tmp_path / "compiled")
    return tmp_path / "compiled"


def test_files_are_in_step():
    result = CliRunner().invoke(app, ["compile", "--check"])
    assert result.exit_code == 0, result.output
    shipped = ("salun-unlearning", "salun-deletion-sweep", "salun-deletion-sweep-compact")
    names = [name for one in shipped for name in (one, f"{one}-cpu")]
    assert result.stdout == "".join(f"{name}.yaml is in step\n" for name in names)


def test_compilation_is_deterministic():
    """In two processes, which hash text differently."""
    other = next(seed for seed in ("1", "2") if seed != os.environ.get("PYTHONHASHSEED"))
    environ = {**os.environ, "PYTHONHASHSEED": other}
    command = [sys.executable, "-c", PRINT_TEXT]
    printed = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout
    assert printed == "".join(item.text for item in compiling.compile_all()) + "\n" != "\n"


def test_drift_is_reported_and_fixed(copied):
    file = copied / "salun-unlearning.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("runAsUser: '10001'", "runAsUser: '0'"), encoding="utf-8")
    result = CliRunner().invoke(app, ["compile", "--check"])
    assert result.exit_code == 1
    assert "salun-unlearning.yaml is out of step with its source" in result.stdout
    assert "salun-unlearning-cpu.yaml is in step" in result.stdout
    assert CliRunner().invoke(app, ["compile"]).exit_code == 0
    assert CliRunner().invoke(app, ["compile", "--check"]).exit_code == 0


def test_missing_file_is_drift(copied):
    (copied / "salun-unlearning-cpu.yaml").unlink()
    result = CliRunner().invoke(app, ["compile", "--check", "--cpu"])
    assert result.exit_code == 1
    in_step = "".join(f"salun-{name}-cpu.yaml is in step\n" for name in ("deletion-sweep", "deletion-sweep-compact"))
    assert result.stdout == f"salun-unlearning-cpu.yaml does not exist\n{in_step}"


def test_compiler_version_is_not_drift(copied):
    file = copied / "salun-unlearning.yaml"
    text = file.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("sdkVersion:")]
    file.write_text(text.replace(line, "sdkVersion: kfp-2.16.0"), encoding="utf-8")
    assert CliRunner().invoke(app, ["compile", "--check"]).exit_code == 0


def test_a_defect_stops_the_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "IMAGE", "another:1")
    with pytest.raises(IntegrityError, match="is not another:1"):
        compiling.compile_all()


@pytest.mark.parametrize("name", [name for name in packages.shipped() if name.endswith("-cpu")])
def test_pipeline_for_clusters_without_accelerators(name):
    text = (packages.COMPILED / f"salun-{name}.yaml").read_text(encoding="utf-8")
    spec, _ = packages.load_documents(text)
    assert "gpu" not in text.lower()
    assert "accelerator" not in text
    assert spec["pipelineInfo"]["name"] == f"salun-{name}"


def test_local_runs_differ_from_the_file_by_retries_and_the_id_alone(documents):
    text = "\n---\n".join(map(json.dumps, documents))
    spec, platform = packages.load_documents(for_this_machine(text, "run-1", {}))
    dags = [documents[0]["root"], *(item for item in documents[0]["components"].values() if "dag" in item)]
    found = [task for dag in dags for task in dag["dag"]["tasks"].values()]
    assert sum("retryPolicy" in task for task in found) == 6
    for task in found:
        task.pop("retryPolicy", None)
        given = task.get("inputs", {}).get("parameters", {})
        if "run_id" in given:
            assert given["run_id"] == {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
            given["run_id"] = {"runtimeValue": {"constant": "run-1"}}
        if policy := task.get("triggerPolicy", {}).get("condition"):  # see the last test of this file
            renamed = policy.replace("fetch-model-code", "fetch-model--code")
            task["triggerPolicy"]["condition"] = renamed
    assert [spec, platform] == documents


def test_signing_key_of_the_environment_wins_on_this_machine():
    text = (packages.COMPILED / "salun-deletion-sweep.yaml").read_text(encoding="utf-8")
    for environ, kept in (({}, True), ({"SALUN_SIGNING_KEY": "key.pem"}, False)):
        spec = packages.load_documents(for_this_machine(text, "run-1", environ))[0]
        for step in ("exec-claim-requests", "exec-settle-requests"):
            given = {item["name"] for item in spec["deploymentSpec"]["executors"][step]["container"]["env"]}
            assert given == {"SALUN_PIPELINE", *(["SALUN_SIGNING_KEY"] if kept else [])}


def test_condition_on_a_named_output_is_rewritten_for_this_machine():
    """kfp.local silently skips a task that depends on an output with another name than `Output`."""
    text = (packages.COMPILED / "salun-deletion-sweep.yaml").read_text(encoding="utf-8")
    spec = packages.load_documents(for_this_machine(text, "run-1", {}))[0]
    (group,) = [item for name, item in spec["components"].items() if name.startswith("comp-exit-handler")]
    conditions = [
        task["triggerPolicy"]["condition"] for task in group["dag"]["tasks"].values() if "triggerPolicy" in task
    ]
    joined = " ".join(" ".join(conditions).split())
    for name in ("requests", "code"):
        assert f"['pipelinechannel--claim-requests--{name}']) > 0" in joined
