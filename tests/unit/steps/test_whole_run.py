"""A whole run and a whole sweep in one process with the settings searched for, and more measured."""

from __future__ import annotations

import json

import pytest

from salun_core.certificates.keys import create_key
from salun_core.config import load, parse
from salun_core.data.targets import ClassTarget
from salun_core.errors import GateRefusedError, LineHeldError, UsageError
from salun_core.registry.lookup import read_head
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.saliency import SaliencyMask
from salun_core.steps.run import run_all
from salun_core.steps.run_form import DeletionSweepForm, UnlearningForm
from salun_core.steps.sweep import sweep_once
from salun_core.storage.leases import holder_of
from salun_core.sweeps.heartbeat import hold_line
from salun_core.sweeps.runs import RunLog, RunStatus
from salun_core.times import utc_clock
from salun_core.tuning import TuningLog

QUICK = {"epochs": 1, "device": "cpu", "batch_size": 64}


@pytest.fixture
def told(store, digits_line):
    """The parameters that a run and a sweep are told alike."""
    return {"model_line": digits_line, "store_uri": store.uri, "method": "salun", "method_config": QUICK}


def forget_class(tmp_path):
    path = tmp_path / "forget.json"
    path.write_text(json.dumps({"kind": "class", "class_id": 3}))
    return str(path)


def policy(tmp_path, metric, least):
    rule = {"metric": metric, "op": ">=", "value": least, "reason": "as the test wants it"}
    path = tmp_path / f"{metric}.json"
    path.write_text(json.dumps({"format": "salun.policy/v1", "name": "asked", "rules": [rule]}))
    return str(path)


@pytest.mark.s3
def test_a_run_is_tuned_measured_further_and_judged_by_the_one_policy(told, store, tmp_path):
    asks = policy(tmp_path, "probe_auc", 0.0)  # only what `extra_metrics` adds can satisfy it
    search = {"tune": True, "tune_budget": "3e", "extra_metrics": "probe,decile", "policy_uri": asks}
    told_of, trials, folder, holders = [], [], tmp_path / "run", set()

    def say(step):
        told_of.append(step)
        holders.add(holder_of(store, "digits"))

    config = UnlearningForm(**told, **search, forget_manifest_uri=forget_class(tmp_path))
    outcome = run_all(config, folder, say, "run-1", trials.append)
    assert (holders, holder_of(store, "digits")) == ({"run-1"}, None)

    assert told_of == ["fetch_model", "compute_mask", "unlearn", "evaluate", "gate_publish"]
    evidence, log = outcome.evidence, load(TuningLog, folder / "after" / "tuning.json")
    assert (evidence.run.tuning.budget, log.policy, len(trials)) == ("3e", "asked", len(log.trials))
    assert evidence.run.tuning.policy_digest == outcome.published.decision.policy_digest
    assert evidence.measured.mask == SaliencyMask.load(folder / "after" / "mask.safetensors").digest
    assert evidence.further.asked == ["probe", "decile"]
    assert outcome.published.decision.passed
    assert read_head(store, "digits")[0].version == outcome.published.version != outcome.parent
    passes = evidence.run.tuning.passes + evidence.forgotten.count
    assert evidence.run.passes == passes  # the search's, and the mask step's


@pytest.mark.s3
def test_a_line_that_another_run_holds_is_left_alone(told, store, tmp_path):
    hold_line(store, "digits", "run-9")
    with pytest.raises(LineHeldError, match="line held by run-9") as caught:
        run_all(UnlearningForm(**told, forget_manifest_uri=forget_class(tmp_path)), tmp_path / "run")
    assert (caught.value.exit_code, holder_of(store, "digits")) == (4, "run-9")
    assert not (tmp_path / "run").exists()


@pytest.mark.s3
def test_a_search_that_stays_without_a_setting_is_a_refusal_of_the_gate(told, store, tmp_path):
    head = read_head(store, "digits")[0].version
    search = {"tune": True, "tune_budget": "2e", "policy_uri": policy(tmp_path, "RA", 1.5)}
    with pytest.raises(GateRefusedError, match="no setting satisfies the policy asked") as caught:
        run_all(UnlearningForm(**told, **search, forget_manifest_uri=forget_class(tmp_path)), tmp_path / "run")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run" / "after").exists()
    assert read_head(store, "digits")[0].version == head


@pytest.mark.s3
def test_after_a_search_without_a_setting_the_next_recipe_has_its_turn(told, store, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))
    ledger = Ledger(store, utc_clock)
    ledger.submit("r-1", "digits", ClassTarget(class_id=3))
    search = {"tune": True, "tune_budget": "2e", "min_requests": 1}
    strict = DeletionSweepForm(**told, **search, policy_uri=policy(tmp_path, "RA", 1.5))
    done = sweep_once(strict, tmp_path / "refused", purge_after=False)
    last = ledger.state("r-1").last
    assert (done.error.exit_code, last.to_status, last.attempt) == (3, Status.QUEUED, 2)
    assert "next: a gentler recipe" in last.reason  # the closest setting lost what it had to keep
    assert RunLog(store, utc_clock).status(done.run) is RunStatus.GATE_REFUSED

    mild = DeletionSweepForm(**told, **search, policy_uri=policy(tmp_path, "worst_decile", 0.0), extra_metrics="decile")
    trials = []
    done = sweep_once(mild, tmp_path / "passed", on_trial=trials.append, purge_after=False)
    assert done.error is None
    assert ledger.status("r-1") is Status.COMPLETED
    assert len(trials) == done.outcome.evidence.run.tuning.trials
    assert "learning_rate" not in trials[0].settings  # the gentler recipe has set it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"extra_metrics": "prob"}, "did you mean 'probe'"),
        ({"extra_metrics": "kl"}, "there is no retrained model"),
        ({"tune": True, "tune_budget": "many"}, "is not a budget"),
        ({"policy_uri": "clasifier"}, "did you mean 'classifier'"),
        ({"policy_uri": "RAA"}, "unknown metric in policy asked: 'RAA'.*did you mean 'RA'"),
    ],
)
@pytest.mark.s3
def test_what_would_fail_at_last_is_refused_at_first(told, store, tmp_path, monkeypatch, wrong, message):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(create_key(tmp_path / "keys" / "salun").private))
    given = told | wrong
    if wrong.get("policy_uri") == "RAA":
        given["policy_uri"] = policy(tmp_path, "RAA", 0.5)
    with pytest.raises(UsageError, match=message):
        run_all(UnlearningForm(**given, forget_manifest_uri=forget_class(tmp_path)), tmp_path / "run")
    Ledger(store, utc_clock).submit("r-1", "digits", ClassTarget(class_id=3))
    with pytest.raises(UsageError, match=message):
        sweep_once(DeletionSweepForm(**given, min_requests=1), tmp_path / "run")
    assert Ledger(store, utc_clock).state("r-1").last.attempt == 1
    assert not (tmp_path / "run").exists()


def test_a_file_from_before_the_new_settings_asks_for_nothing_more():
    old = {"model_line": "digits", "store_uri": "s3://salun", "forget_manifest_uri": "forget.json"}
    config = parse(UnlearningForm, old, "run.yaml")
    assert (config.tune, config.tune_budget, config.extra_metrics) == (False, "20e", "")
    assert parse(UnlearningForm, {**old, "tune_budget": 200000}, "run.yaml").tune_budget == "200000"
