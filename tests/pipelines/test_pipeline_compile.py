"""The files that ship are what the source compiles to, whoever compiles it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines import compile as compiling
from pipelines.cli import app
from pipelines.local_worker import without_retries
from salun_core.errors import IntegrityError

ROOT = Path(__file__).resolve().parents[2]
PRINT_TEXT = "from pipelines.compile import compile_all; print(''.join(item.text for item in compile_all()))"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the files that ship, to be changed by a test."""
    shutil.copytree(compiling.FOLDER, tmp_path / "compiled")
    monkeypatch.setattr(compiling, "FOLDER", tmp_path / "compiled")
    return tmp_path / "compiled"


def test_files_are_in_step():
    result = CliRunner().invoke(app, ["compile", "--check"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "salun-unlearning.yaml is in step\nsalun-unlearning-cpu.yaml is in step\n"


def test_compilation_is_deterministic():
    texts = [
        subprocess.run(
            [sys.executable, "-c", PRINT_TEXT],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] != ""


def test_drift_is_reported_and_mended(copied):
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
    assert result.stdout == "salun-unlearning-cpu.yaml does not exist\n"


def test_version_of_the_compiler_is_no_drift(copied):
    file = copied / "salun-unlearning.yaml"
    text = file.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("sdkVersion:")]
    file.write_text(text.replace(line, "sdkVersion: kfp-2.16.0"), encoding="utf-8")
    assert CliRunner().invoke(app, ["compile", "--check"]).exit_code == 0


def test_a_defect_stops_the_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "IMAGE", "another:1")
    with pytest.raises(IntegrityError, match="is not another:1"):
        compiling.compile_all()


def test_pipeline_for_clusters_without_accelerators():
    text = (compiling.FOLDER / "salun-unlearning-cpu.yaml").read_text(encoding="utf-8")
    spec, _ = yaml.safe_load_all(text)
    assert "gpu" not in text.lower()
    assert "accelerator" not in str(spec["root"]["dag"]["tasks"])
    assert spec["pipelineInfo"]["name"] == "salun-unlearning-cpu"


def test_local_runs_differ_from_the_file_by_retries_alone(documents):
    spec, platform = yaml.safe_load_all(without_retries(yaml.safe_dump_all(documents)))
    for task in documents[0]["root"]["dag"]["tasks"].values():
        assert task.pop("retryPolicy")
    assert [spec, platform] == documents
