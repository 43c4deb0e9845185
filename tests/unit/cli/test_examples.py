"""Every example of the help runs as written and prints what the help shows, figures aside."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from salun_core.cli.app import app, load_examples
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from salun_core.tasks import register_model
from salun_core.times import utc_clock
from tests.support.decisions import PROCEDURE

pytestmark = pytest.mark.slow

EXAMPLES = load_examples()
ORDER = [
    "train classifier",
    "mask",
    "unlearn",
    "evaluate",
    "gate",
    "report",
    "model import",
    "run",
    "model history",
    "model list",
    "model show",
    "model diff",
    "model export",
    "model pull",
    "exporter",
]
CERTIFICATES = ["key create", "certificate", "verify"]
REQUESTS = [f"request {verb}" for verb in ("submit", "show", "list", "reindex", "hold", "release")]
REQUESTS += [f"request {verb}" for verb in ("retry", "reopen", "cancel")]
RETENTION = ["model hold", "model release", "purge"]
DIFFUSION = ["train ddpm", "train stable-diffusion"]
ELSEWHERE = {  # e2e, lab/bench, test_calibration.py, test_sweep_cli.py, test_plugin_verbs.py, unit/audit, below
    *("plugin list", "plugin check"),
    *("demo", "demo-diffusion"),
    *("bench run", "bench render", "calibrate"),
    "store serve",
    *("sweep", "model rollback"),
    "audit",
}
ALONE = ["init", "doctor", "ls methods", "ls models", "ls data"]


def _verbs(command, path=()):
    for name, child in getattr(command, "commands", {}).items():
        below = (*path, name)
        yield from _verbs(child, below) if hasattr(child, "commands") else [" ".join(below)]


def _parsed(text):
    """Return the arguments and the lines of output of an example."""
    lines = text.splitlines()
    while lines[0].startswith("# "):
        lines.pop(0)
    typed = [lines.pop(0)]
    while typed[-1].endswith("\\"):
        typed.append(lines.pop(0))
    return shlex.split(" ".join(line.rstrip("\\") for line in typed).removeprefix("$ ")), lines


def _shape(lines):
    """Names stay, figures and digests do not."""
    words = [re.split(r" {2,}", re.sub(r"─+", "─", line.strip()))[0] for line in lines]
    return [re.sub(r"\b[0-9a-f]{12}\b|\d+", "N", word) for word in words]


def test_every_verb_has_an_example():
    verbs = list(_verbs(typer.main.get_command(app)))
    assert sorted(verbs) == sorted(EXAMPLES)
    assert {*ORDER, *RETENTION, *REQUESTS, *CERTIFICATES, *DIFFUSION, *ALONE} == set(verbs) - ELSEWHERE


def _check(salun, verb):
    (program, *args), lines = _parsed(EXAMPLES[verb])
    assert program == "salun"
    assert " ".join(args).startswith(verb)
    result = salun(*args)
    assert result.exit_code == 0, result.stderr
    shown, told = (_shape(_anywhere(text)) for text in (result.stdout.rstrip().splitlines(), lines))
    assert shown == told


def _anywhere(lines):
    """Leave out what depends on the machine: whether it has an engine for containers, and the advice if not."""
    return [line for line in lines if not line.strip().startswith("container engine")]


def test_the_examples_follow_each_other(salun, real_store, monkeypatch, tmp_path):
    store = real_store
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    (tmp_path / "forget.yaml").write_text("{kind: class, class_id: 3}")
    assert "# forget.yaml: {kind: class, class_id: 3}\n" in EXAMPLES["mask"]
    settings = re.search(r"# run\.yaml: (.*)\n", EXAMPLES["run"])[1]
    (tmp_path / "run.yaml").write_text(settings.replace("s3://salun", store.uri))
    for verb in ORDER + RETENTION:
        _check(salun, verb)
    first = json.loads(salun("model", "history", "digits", "--json").stdout)[-1]["version"]
    refused = salun("model", "rollback", f"digits@{first}", "--reason", "accuracy fell")
    assert refused.exit_code == 4
    said = " ".join(EXAMPLES["model rollback"].split())
    for part in ("would bring back", "it would undo 1 versions and", "give --reopen to queue these requests again"):
        assert part in said
        assert part in refused.stderr


def test_the_examples_of_requests(salun, store, monkeypatch, digits_model):
    register_model(store, "faces", digits_model, "train", 1)
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    monkeypatch.setenv("SALUN_ACTOR", "ana")
    monkeypatch.setattr("salun_core.times.utc_clock", lambda: datetime(2026, 1, 31, 9, tzinfo=UTC))
    ledger = Ledger(store, utc_clock)
    ends = {"request retry": Status.FAILED, "request reopen": Status.COMPLETED}
    for verb in REQUESTS:
        if verb in ends:
            ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed"))
            done = {"outcome": Outcome.UNLEARNED, "assurance": PROCEDURE}
            more = done if ends[verb] is Status.COMPLETED else {}
            ledger.move("r-1", Transition(ends[verb], "sweep", "ended", **more))
        _check(salun, verb)


def test_the_examples_of_certificates(salun, store, monkeypatch, tmp_path):
    fixture = Path(__file__).parents[2] / "fixtures" / "certificates" / "v1"
    shutil.copytree(fixture, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    monkeypatch.delenv("SALUN_VERIFY_KEY", raising=False)
    store.put_new("certificates/r-1.json", (fixture / "certificate.json").read_bytes())
    for verb in CERTIFICATES:
        _check(salun, verb)


def test_the_examples_of_diffusion_models(salun, tmp_path):
    pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
    assert "# sd.yaml: {source: digits, size: 16, channels: 3}" in EXAMPLES["train stable-diffusion"]
    (tmp_path / "sd.yaml").write_text("{source: digits, size: 16, channels: 3}")
    for verb in DIFFUSION:
        _check(salun, verb)


@pytest.mark.parametrize("verb", ALONE)
def test_an_example_that_stands_alone(salun, s3_server, verb):
    _check(salun, verb)
