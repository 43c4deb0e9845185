"""Whole sweeps of a real classifier: from filed requests to certificates, and back by a rollback that is owed for."""

from __future__ import annotations

import json

import pytest

from salun_core.certificates.keys import create_key
from salun_core.certificates.verify import verify_certificate
from salun_core.data import loading
from salun_core.data.targets import ClassTarget, SamplesTarget
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.models import load_model
from salun_core.registry.lookup import ancestry, read_head
from salun_core.registry.versions import fetch_version
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Outcome, Review, Status
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.steps.sweep import sweep_once
from salun_core.storage import s3
from salun_core.storage.keys import certificate_key
from salun_core.storage.leases import holder_of
from salun_core.sweeps.rollback import rollback
from salun_core.sweeps.runs import RunLog, RunStatus
from salun_core.times import utc_clock

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return create_key(tmp_path_factory.mktemp("keys") / "salun")


@pytest.fixture
def config(store, digits_line, keys, monkeypatch):
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(keys.private))
    return DeletionSweepForm(
        model_line=digits_line,
        store_uri=store.uri,
        min_requests=1,
        method="salun",
        method_config={"epochs": 2, "device": "cpu", "batch_size": 32},
    )


def certificate(store, request, folder):
    path = folder / f"{request}.json"
    path.write_bytes(store.get(certificate_key(request)).data)
    return path


def test_a_frozen_forget_set_that_is_replaced_ends_its_run_only(config, store, digits_model, tmp_path):
    ledger, line = Ledger(store, utc_clock), config.model_line
    ids = load_model(digits_model).split.ids("train")
    ledger.submit("one", line, SamplesTarget(ids=ids[:1]))
    head = read_head(store, line)[0].version

    def replace(step):
        if step != "fetch_model":
            return
        (key,) = [entry.key for entry in store.list("scratch/") if entry.key.endswith("forget.json")]
        found = store.get(key)
        document = json.loads(found.data)
        store.put_if(key, json.dumps({**document, "ids": sorted(ids[5:7])}).encode(), found.etag)

    done = sweep_once(config, tmp_path / "run", replace)
    assert isinstance(done.error, IntegrityError)
    assert "the forget set that the run claimed" in str(done.error)
    assert read_head(store, line)[0].version == head
    assert ledger.status("one") is Status.QUEUED
    assert holder_of(store, line) is None


def test_requests_are_erased_certified_rolled_back_and_erased_again(
    config, store, keys, digits_model, tmp_path, monkeypatch
):
    reads, read_table = [], loading.read_table
    monkeypatch.setattr(loading, "read_table", lambda *given: reads.append(given) or read_table(*given))
    ledger, line = Ledger(store, utc_clock), config.model_line
    ids = load_model(digits_model).split.ids("train")[:2]
    ledger.submit("a-class", line, ClassTarget(class_id=3))
    ledger.submit("untrained", line, SamplesTarget(ids=load_model(digits_model).split.ids("test")[:1]))
    ledger.submit("unknown", line, SamplesTarget(ids=["no-such-digit"]))
    before = read_head(store, line)[0].version

    clients = s3._client_of.cache_info().misses
    done = sweep_once(config, tmp_path / "run")
    assert done.error is None
    assert len(reads) == 1  # by the claim, for the whole run
    assert s3._client_of.cache_info().misses == clients  # every step uses the client of the `store` fixture
    assert (list(done.settled.completed), done.claimed.requests) == (["a-class"], 1)
    assert ledger.state("a-class").last.outcome is Outcome.UNLEARNED
    assert ledger.state("untrained").last.outcome is Outcome.NOTHING_TO_ERASE
    assert ledger.state("unknown").last.outcome is Review.UNMATCHED
    assert RunLog(store, utc_clock).status(done.run) is RunStatus.PUBLISHED
    assert holder_of(store, line) is None

    fetch_version(store, line, done.settled.version, tmp_path / "model")
    found = verify_certificate(certificate(store, "a-class", tmp_path), tmp_path / "model", keys=[keys.public])
    assert found.certificate.predicate.outcome is Outcome.UNLEARNED
    fetch_version(store, line, before, tmp_path / "searched")
    verify_certificate(certificate(store, "untrained", tmp_path), tmp_path / "searched", keys=[keys.public])

    assert sweep_once(config, tmp_path / "empty").claimed.requests == 0

    reference = f"{line}@{before[:12]}"
    with pytest.raises(ConflictError, match="would bring back"):
        rollback(store.uri, reference, "ana", "a bad day")
    assert read_head(store, line)[0].version == done.settled.version
    back = rollback(store.uri, reference, "ana", "a bad day", reopen=True)
    assert (list(back.reopened), back.head.version) == (["a-class"], before)
    assert ledger.status("a-class") is Status.QUEUED

    again = sweep_once(config, tmp_path / "again")
    assert again.error is None
    assert ledger.status("a-class") is Status.COMPLETED  # found again by salted hashes or its class, though redacted
    assert read_head(store, line)[0].version == again.settled.version
    assert [item.digest for item in ancestry(store, line)] == [again.settled.version, before]
    newer = json.loads(store.get(certificate_key("a-class")).data)
    assert newer != json.loads((tmp_path / "a-class.json").read_bytes())
    assert len(list(store.list("addenda/a-class/certificate-"))) == 1
    assert ids  # the samples of another class stay


def test_after_damage_the_next_sweep_is_gentler_and_passes(config, store, tmp_path):
    ledger = Ledger(store, utc_clock)
    ledger.submit("r-1", config.model_line, ClassTarget(class_id=3))
    rough = config.model_copy(update={"method_config": {**config.method_config, "learning_rate": 0.03}})
    done = sweep_once(rough, tmp_path / "run", purge_after=False)
    last = ledger.state("r-1").last
    assert (done.error.exit_code, last.to_status, last.attempt) == (3, Status.QUEUED, 2)
    assert [item.causes for item in last.tried] == [["damaged"]]
    assert last.reason.endswith("next: a gentler recipe (salun, learning_rate 0.01)")
    assert RunLog(store, utc_clock).status(done.run) is RunStatus.GATE_REFUSED
    done = sweep_once(rough, tmp_path / "again", purge_after=False)
    assert done.error is None
    assert done.claimed.recipe.method_config["learning_rate"] == 0.01
    assert ledger.status("r-1") is Status.COMPLETED


def test_a_run_that_diverges_is_damage_and_not_repeated(config, store, tmp_path):
    Ledger(store, utc_clock).submit("r-1", config.model_line, ClassTarget(class_id=3))
    wild = config.model_copy(update={"method_config": {**config.method_config, "learning_rate": 1e4}})
    done = sweep_once(wild, tmp_path / "run", purge_after=False)
    assert (done.error.exit_code, "is not finite" in done.error.what) == (1, True)
    assert done.settled.next == "the gate refused the run (damaged); next: a gentler recipe (salun, learning_rate 3333)"
    assert done.settled.status is RunStatus.GATE_REFUSED


def test_a_sweep_without_a_signing_key_ends_before_it_begins(config, store, tmp_path, monkeypatch):
    monkeypatch.delenv("SALUN_SIGNING_KEY")
    Ledger(store, utc_clock).submit("r-1", config.model_line, ClassTarget(class_id=3))
    with pytest.raises(UsageError, match="signing key|SALUN_SIGNING_KEY"):
        sweep_once(config, tmp_path / "run")
    assert Ledger(store, utc_clock).status("r-1") is Status.QUEUED


def test_a_dry_run_says_what_waits_and_writes_nothing(config, store, tmp_path):
    Ledger(store, utc_clock).submit("r-1", config.model_line, ClassTarget(class_id=3))
    keys = sorted(entry.key for entry in store.list(""))
    done = sweep_once(config.model_copy(update={"dry_run": True}), tmp_path / "run")
    assert "1 waiting; a batch is due" in done.claimed.reason
    assert sorted(entry.key for entry in store.list("")) == keys
