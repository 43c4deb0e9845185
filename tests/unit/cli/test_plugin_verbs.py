"""The example plug-in as a user has it: `salun plugin`, a run of its method, its metrics, and the gate on them."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest
from packaging.version import Version

from salun_core.cli.app import load_examples
from salun_core.gate import load_policy
from salun_core.plugins import GROUPS
from tests.support.plugins import EXAMPLE, example, package, write_metadata
from tests.unit.cli.test_examples import _parsed, _shape

__all__ = ["example"]


def test_the_example_has_at_most_60_lines():
    assert sum(len(path.read_text().splitlines()) for path in EXAMPLE.iterdir() if path.is_file()) <= 60


def test_plug_ins_are_listed_without_running_them(salun, example, monkeypatch, tmp_path):
    monkeypatch.setenv("SALUN_PLUGINS", "")
    _, lines = _parsed(load_examples()["plugin list"])
    assert _shape(salun("plugin", "list").stdout.splitlines()) == _shape(lines)
    points = {"salun": "salun_lab:X", "fade": "salun_lab", "uniform": "salun_lab:X"}
    write_metadata(tmp_path, "salun-lab", "1.0", {GROUPS["method"]: points})
    (tmp_path / "salun_lab.py").write_text("raise SystemExit('ran')")
    with package(tmp_path, monkeypatch, "salun-example"):
        rows = json.loads(salun("plugin", "list", "--json").stdout)
    states = {(row["distribution"], row["name"]): row["state"] for row in rows}
    assert states["salun-lab", "salun"] == "hidden: salun ships; rename the entry point"
    assert states["salun-lab", "fade"] == "'salun_lab' is not package:object; correct it"
    assert states["salun-lab", "uniform"] == "ambiguous: salun-example offers it, too; uninstall one of them"
    assert states["salun-example", "pocket"] == "allowed"


@pytest.mark.usefixtures("forked_runs")
def test_the_example_holds_the_contract(salun, example, monkeypatch):
    monkeypatch.setenv("SALUN_PLUGINS", "")  # the command itself allows what it is told to run
    found = salun("plugin", "check", "salun-example", "--json")
    assert found.exit_code == 0, found.stdout + found.stderr
    rows = json.loads(found.stdout)
    assert {row["state"] for row in rows} == {"holds"}
    assert {row["plugin"] for row in rows} == {"uniform", "confidence", "entropy_area", "pocket"}
    monkeypatch.setenv("SALUN_PLUGINS", "")
    shown = salun("plugin", "check", "uniform").stdout.splitlines()
    assert _shape(shown) == _shape(_parsed(load_examples()["plugin check"])[1])
    refused = salun("plugin", "check", "unifrom")
    assert (refused.exit_code, "did you mean 'uniform'" in refused.stderr) == (2, True)


def version_of(name):
    """Return the version of a package; 0 if it is not installed."""
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Version("0")


@pytest.mark.slow
@pytest.mark.skipif(version_of("pip") == Version("0"), reason="pip is not installed")
@pytest.mark.skipif(version_of("setuptools") < Version("77"), reason="setuptools 77 or later is not installed")
def test_the_example_installed_by_pip_holds_the_contract(tmp_path):
    """In new processes, as an author does it. The other tests write the metadata of the package themselves."""
    source, folder = shutil.copytree(EXAMPLE, tmp_path / "source"), tmp_path / "plugins"  # building writes there
    pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target", folder, source]
    environ = {name: value for name, value in os.environ.items() if name != "SALUN_PLUGINS"}
    path = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), str(folder)]))
    check = ["-m", "salun_core.cli", "plugin", "check", "salun-example", "--json"]
    for command, variables in ((pip, environ), (check, {**environ, "PYTHONPATH": path})):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert {row["state"] for row in rows} == {"holds"}
    found = {row["plugin"]: row["found"] for row in rows if row["check"] == "loads"}
    assert found.keys() == {"uniform", "confidence", "entropy_area", "pocket"}
    assert all("(salun-example 1.0, sha256 " in words for words in found.values())


def test_a_plug_in_that_breaks_the_contract_ends_with_code_1(salun, monkeypatch, tmp_path):
    (tmp_path / "lab_nets.py").write_text("def small():\n    return 3\n")
    with package(tmp_path, monkeypatch):
        found = salun("plugin", "check", "lab_nets:small")
    assert found.exit_code == 1
    assert "1 of 2 checks fail, the first one: lab_nets:small, runs" in found.stderr


@pytest.mark.usefixtures("example")
def test_a_run_names_its_plug_ins_and_the_gate_asks_the_policy(salun, digits_model, tmp_path):
    (tmp_path / "forget.json").write_text('{"kind": "class", "class_name": "3"}')
    own = load_policy("classifier").model_copy(update={"plugins": ["salun-example"]})
    (tmp_path / "own.json").write_text(own.model_dump_json())
    pair = ("--forget", "forget.json", "--mask", "mask.safetensors")
    measured = ("--report", "report.html", "--extra-metrics", "confidence,entropy_area")
    steps = [
        ("mask", "--model", digits_model, "--forget", "forget.json", "--out", "mask.safetensors"),
        ("unlearn", "--model", digits_model, *pair, "--method", "uniform", "--set", "epochs=1", "--out", "after"),
        ("evaluate", "--before", digits_model, "--after", "after", *pair, "--out", "evidence.json", *measured),
    ]
    for words in steps:
        done = salun(*words)
        assert done.exit_code == 0, (words, done.stdout + done.stderr)
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    assert [(item["kind"], item["name"], item["version"]) for item in evidence["run"]["plugins"]] == [
        ("method", "uniform", "1.0")
    ]
    assert {item["name"] for item in evidence["plugins"]} == {"confidence", "entropy_area"}
    area = evidence["metrics"]["entropy_area"]
    assert area["after"] < 0.1 < area["before"]  # the forgotten class became less certain than unseen data
    assert evidence["metrics"]["confidence"]["n"] == evidence["forgotten"]["count"]
    verdicts = {}
    for name in ("classifier", "own.json"):
        salun("gate", "--evidence", "evidence.json", "--policy", name, "--out", "decision.json")
        decision = json.loads((tmp_path / "decision.json").read_text())
        verdicts[name] = next(item for item in decision["verdicts"] if item["rule"] == "plug-ins")["passed"]
    assert verdicts == {"classifier": False, "own.json": True}
