"""`salun sweep`: a whole sweep in one process, its exit codes, and settling by hand."""

from __future__ import annotations

import json
import re
import shlex
from datetime import datetime, timedelta

import pytest

from salun_core.certificates.keys import create_key
from salun_core.cli.app import load_examples
from salun_core.cli.runs import sweep_facts
from salun_core.data.targets import ClassTarget, SamplesTarget
from salun_core.errors import GateRefusedError
from salun_core.gate import Policy, decide
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.registry.lookup import read_head, read_version
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.steps.claim import claim_requests, sweep_policy
from salun_core.steps.evaluation import write_evidence
from salun_core.steps.publishing import write_decision
from salun_core.steps.sweep import SweepOutcome
from salun_core.storage.keys import blob_key, certificate_key, run_key, scratch_prefix
from salun_core.storage.leases import holder_of
from salun_core.sweeps.claim import Claim
from salun_core.sweeps.runs import RunStatus
from salun_core.sweeps.settle import Settled
from salun_core.tasks.line import OpenLine
from salun_core.times import utc_clock
from tests.support.decisions import refused
from tests.unit.test_refusal import evidence

EXAMPLE = load_examples()["sweep"].splitlines()
RULE = {"metric": "attack_auc", "op": "<=", "value": 0.5, "reason": "forgotten samples must look unseen"}


@pytest.fixture
def ledger(store, digits_line, monkeypatch, tmp_path):
    """The ledger of a store with a model line; a key to sign with is named in the environment."""
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)
    return Ledger(store, utc_clock)


@pytest.fixture
def sweep(salun, ledger, monkeypatch, store):
    monkeypatch.setenv("SALUN_STORE_URI", store.uri)  # `salun` takes it away
    return lambda *args: salun("sweep", "--line", "digits", *args)


def _shape(text):
    return re.sub(r"run-[0-9a-f-]+|\b[0-9a-f]{12}\b|\d+", "N", text)


def test_the_example_and_a_sweep_that_finds_nothing_more(sweep, salun, ledger, store, digits_model):
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    ledger.submit("r-2", "digits", SamplesTarget(ids=load_model(digits_model).split.ids("test")[:1]))
    parent = read_head(store, "digits")[0].version
    waiting = sweep("--once")
    assert waiting.exit_code == 0
    assert re.search(
        r"claimed    0: 2 waiting, and no batch is due before 20\d\d-.* UTC, unless 14 more", waiting.stdout
    )
    assert "to erase them now: salun sweep --now --line digits" in waiting.stdout
    told = json.loads(sweep("--once", "--json").stdout)
    assert datetime.fromisoformat(told["due_at"]) - utc_clock() > timedelta(hours=23)

    result = salun(*shlex.split(EXAMPLE[0].removeprefix("$ salun ")))
    assert result.exit_code == 0, result.stderr
    assert [_shape(line) for line in result.stdout.splitlines()] == [_shape(line) for line in EXAMPLE[1:]]
    assert read_head(store, "digits")[0].version != parent
    assert all(store.get(certificate_key(request)) for request in ("r-1", "r-2"))

    idle = json.loads(sweep("--once", "--json").stdout)
    assert (idle["requests"], idle["skipped"]) == ({}, "no_requests")


def test_a_run_that_ends_in_an_error_is_told_whole_and_ends_in_its_exit_code(sweep, ledger, store):
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    head = read_head(store, "digits")[0].version
    weights = blob_key(read_version(store, "digits", head).files["model.safetensors"].sha256)
    store.delete(weights)
    store.put_new(weights, b"damaged")
    broken = sweep("--once", "--min-requests", 1, "--json")
    assert broken.exit_code == 5
    facts = json.loads(broken.stdout)
    assert (facts["claimed"], facts["requests"], facts["version"]) == (1, {"r-1": "queued"}, None)
    assert facts["error"] in broken.stderr
    assert holder_of(store, "digits") is None


def test_a_refusal_says_why():
    error = GateRefusedError("the gate refused the model", "TA >=: no model is perfect", "see decision.json")
    claimed = Claim(Recipe(method="salun"), reason="1 waiting, and 1 make a batch")
    facts = sweep_facts(
        SweepOutcome("run-1", claimed, Settled("run-1", RunStatus.GATE_REFUSED, queued=["r-1"]), None, error)
    )
    assert facts["verdict"] == "REFUSED: TA >=: no model is perfect"
    assert facts["requests"] == {"r-1": "queued"}


def test_a_settled_refusal_says_what_comes_next_and_why(sweep, salun, ledger, store):
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    expected = {
        "damaged": ("queued", "next: a gentler recipe (salun_adaptive, learning_rate 0.001)"),
        "not_measured": ("on_hold: not_measured", "held for review; next: mend it"),
    }
    for cause, (status, then) in expected.items():
        run = f"run-{cause.replace('_', '-')}"
        line = OpenLine(store, "digits")
        claim_requests(store, line, run, sweep_policy(line, Recipe(), min_requests=1))
        store.put_new(run_key(run, "decision.json"), refused(cause, then="mend it").model_dump_json().encode())
        settled = sweep("--settle", run)
        assert settled.exit_code == 0, settled.stderr
        assert then in settled.stdout
        shown = salun("request", "show", "r-1", "--store", store.uri).stdout
        assert shown.startswith(f"r-1: {status}, due ")
        assert then in shown.splitlines()[-1]
        assert shown.splitlines()[-1].startswith("next: the gate refused the run (")


def test_a_refused_sweep_shows_figures_causes_and_the_next_commands(sweep, ledger, monkeypatch, tmp_path):
    """The run's own steps are tested elsewhere: here it ends as the gate ends it."""
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    measured = evidence()
    decision = decide(measured, Policy.model_validate({"name": "strict", "rules": [RULE]}))

    def ended(form, folder, *_args, **_more):
        folder.mkdir()
        write_evidence(folder / "evidence.json", measured)
        write_decision(folder / "decision.json", decision)
        claimed = Claim(Recipe(method="salun"), reason="1 waiting, and 1 make a batch")
        with pytest.raises(GateRefusedError) as caught:
            decision.require("s3://salun/runs/run-1/decision.json")
        settled = Settled("run-1", RunStatus.GATE_REFUSED, failed=["r-1"])
        return SweepOutcome("run-1", claimed, settled, None, caught.value)

    monkeypatch.setattr("salun_core.steps.sweep.sweep_once", ended)
    result = sweep("--once", "--work-dir", tmp_path / "work")
    assert result.exit_code == 3
    for text in (
        "REFUSED by policy strict: 1 of ",
        f"- {decision.refusals[0].text}",
        f"next: {decision.next}",
        f"decision  {tmp_path / 'work' / 'decision.json'}",
        'then: salun request retry r-1 --reason "..."',
        "attack_auc   0.8000   0.5500   50",
    ):
        assert text in result.stdout, text
    printed = result.stdout + result.stderr
    assert printed.count(decision.refusals[0].words) == printed.count(decision.refusals[0].figures) == 1
    assert printed.count(decision.next) == 1
    assert result.stderr.splitlines()[-1] == (
        f"Error: the gate refused the model: {decision.counts}. To fix it: the reasons and the next step are above; "
        f"the decision is in {tmp_path / 'work' / 'decision.json'}; nothing was published."
    )
    again = sweep("--once", "--json", "--work-dir", tmp_path / "again")
    assert decision.refusals[0].words in again.stderr  # the reason stands in the error line, for who reads no JSON
    told = json.loads(again.stdout)
    assert told["decision"]["verdicts"][-1]["refusal"]["cause"] == "not_forgotten"


def test_now_makes_a_batch_due_whatever_the_limits_say(sweep, ledger, digits_model):
    ledger.submit("r-1", "digits", SamplesTarget(ids=load_model(digits_model).split.ids("test")[:1]))
    ledger.submit("r-2", "digits", SamplesTarget(ids=["no-such-digit"]))
    result = sweep("--now", "--min-requests", 100)
    assert result.exit_code == 0, result.stderr
    assert "settled    r-1: completed: nothing_to_erase\nsettled    r-2: on_hold: unmatched" in result.stdout
    assert ledger.status("r-2") is Status.ON_HOLD


def test_a_dry_run_writes_nothing(sweep, ledger, store):
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    before = [(entry.key, entry.etag) for entry in store.list("")]
    result = sweep("--once", "--dry-run", "--min-requests", 1)
    assert result.exit_code == 0, result.stderr
    assert "1 waiting; a batch is due: 1 waiting, and 1 make a batch" in result.stdout
    assert [(entry.key, entry.etag) for entry in store.list("")] == before


def test_a_run_that_died_is_settled_by_hand(sweep, ledger, store):
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    line = OpenLine(store, "digits")
    claim_requests(store, line, "run-1", sweep_policy(line, Recipe(), min_requests=1))
    assert holder_of(store, "digits") == "run-1"
    assert list(store.list(scratch_prefix("run-1")))

    result = sweep("--settle", "run-1", "--method", "salum", "--set", "no_such=1")  # settling needs no configuration
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "run        run-1: failed\nsettled    r-1: queued\n"
    assert holder_of(store, "digits") is None
    assert not list(store.list(scratch_prefix("run-1")))
    assert sweep("--settle", "run-2").stdout == "run        run-2: it had claimed nothing\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "salun-deletion-sweep"),
        (("--once", "--extra-metrics", "prob"), "did you mean 'probe'"),
        (("--once", "--settle", "run-1"), "cannot be used together"),
        (("--now", "--settle", "run-1"), "cannot be used together"),
        (("--once", "--max-forget-fraction", 1.5), "max_forget_fraction"),
        (("--once", "--method", "salum"), "did you mean 'salun'"),
    ],
)
def test_wrong_usage(salun, store, args, message):
    result = salun("sweep", "--line", "digits", "--store", store.uri, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_key_that_is_missing_is_missed_before_the_run(sweep, ledger, store, monkeypatch):
    monkeypatch.delenv("SALUN_SIGNING_KEY")
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    result = sweep("--once", "--min-requests", 1)
    assert result.exit_code == 2
    assert "no signing key is set" in result.stderr
    assert ledger.status("r-1") is Status.QUEUED


def test_a_sweep_is_tuned_and_measured_further(sweep, ledger, store, tmp_path):
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    policy = tmp_path / "asked.yaml"
    rule = {"metric": "worst_decile", "op": ">=", "value": 0.0, "reason": "it must have been measured"}
    policy.write_text(json.dumps({"name": "asked", "rules": [rule]}))
    search = ("--tune", "--tune-budget", "3e", "--extra-metrics", "decile", "--policy", policy, "--set", "epochs=1")
    result = sweep("--once", "--min-requests", 1, "--work-dir", "swept", *search)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("trial ")]
    evidence = json.loads((tmp_path / "swept" / "evidence.json").read_text())
    assert (evidence["run"]["tuning"]["trials"], evidence["further"]["asked"]) == (len(lines), ["decile"])
    assert ledger.status("r-1") is Status.COMPLETED
