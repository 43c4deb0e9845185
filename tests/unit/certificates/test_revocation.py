"""A rollback takes certificates back: signed if a key is at hand, and by the store in any case."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from salun_core.certificates.issue import issue
from salun_core.certificates.keys import public_pem
from salun_core.certificates.verify import verify_certificate
from salun_core.data.targets import SubjectTarget
from salun_core.errors import IntegrityError, StoreError
from salun_core.registry.lookup import Version, read_version
from salun_core.registry.manifest import weights_digest
from salun_core.registry.rollbacks import new_rollback, record_rollback
from salun_core.registry.versions import publish, publish_head, roll_back, stage_version
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from salun_core.retention.addenda import issue_addenda
from salun_core.retention.inventory import scan_store
from salun_core.storage.keys import addenda_prefix, certificate_key
from salun_core.sweeps.rollback import rollback
from salun_core.sweeps.runs import RunLog
from salun_core.times import utc_clock
from tests.support.certified import KEY, evidence_of, input_of, judged, nothing
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test
from tests.support.decisions import PROCEDURE
from tests.support.folder_model import write_folder
from tests.support.toy_line import run_record


@dataclass
class World:
    """A line with a first version, and one that a request was erased by."""

    store: object
    folder: Path
    versions: list[str]

    def __post_init__(self):
        self.ledger = Ledger(self.store, utc_clock)

    def settle(self, request, run, outcome):
        """Move a request through the ledger, as a sweep does."""
        self.ledger.submit(request, "faces", SubjectTarget(subject_ref="person-1"))
        self.ledger.move(request, Transition(Status.IN_PROGRESS, "sweep", "claimed", run, epoch=1))
        self.ledger.move(
            request, Transition(Status.COMPLETED, "sweep", "published", run, outcome, 1, assurance=PROCEDURE)
        )

    def certify(self, request, version, make=input_of):
        manifest = read_version(self.store, "faces", version)
        digests = {name: entry.sha256 for name, entry in manifest.files.items()}
        documents = judged(evidence_of(weights_digest(digests)))
        now = utc_clock().isoformat()
        known = self.ledger.get(request)
        fields = {"request": known, "completed_at": now, "version": Version(version, manifest), "documents": documents}
        issue(self.store, *make(**fields, frozen_digest=None), KEY)

    def fetch(self, request):
        path = self.folder / f"{request}.json"
        path.write_bytes(self.store.get(certificate_key(request)).data)
        return path

    def roll_back(self, **settings):
        return rollback(self.store.uri, f"faces@{self.versions[0]}", "ana", "accuracy fell", **settings)

    def revocations(self, request):
        return [item.key for item in self.store.list(f"{addenda_prefix(request)}revocation-")]

    def purge(self):
        """Issue what a purge issues when it has deleted everything that was due."""
        inventory = scan_store(self.store, utc_clock())
        issue_addenda(self.store, inventory, inventory.keys, KEY, utc_clock())


@pytest.fixture
def world(store, tmp_path, monkeypatch):
    monkeypatch.delenv("SALUN_VERIFY_KEY", raising=False)
    monkeypatch.delenv("SALUN_SIGNING_KEY", raising=False)
    (tmp_path / "salun.pub").write_bytes(public_pem(KEY.public_key()))
    first, _ = publish(store, {"line": "faces", "method": "train"}, write_folder(tmp_path / "before"))
    fields = {"line": "faces", "method": "salun", "parent": first.version, "run": "run-7", "forget_count": 3}
    second, manifest = stage_version(store, fields, write_folder(tmp_path / "after", 100))
    publish_head(store, "faces", second, first.version, "run-7")
    made = World(store, tmp_path, [first.version, second])
    made.settle("r-1", "run-7", Outcome.UNLEARNED)
    made.certify("r-1", second)
    RunLog(store, utc_clock).start(run_record("run-7", first.version, manifest.created_at, line="faces"), "sweep")
    return made


def refused(path, store, **given):
    with pytest.raises(IntegrityError) as caught:
        verify_certificate(path, store_uri=store and store.uri, **given)
    return str(caught.value)


def test_a_certificate_in_use_is_valid_in_its_store(world):
    found = verify_certificate(world.fetch("r-1"), store_uri=world.store.uri)
    assert (found.in_store, found.superseded_by) == (True, None)
    assert not verify_certificate(world.fetch("r-1")).in_store


def test_after_a_rollback_the_store_refuses_it_and_offline_it_cannot_be_known(world):
    path = world.fetch("r-1")
    world.roll_back(reopen=True)
    assert world.revocations("r-1") == []  # no key was at hand
    text = refused(path, world.store)
    version = f"faces@{world.versions[1][:12]}"
    assert f"{path} is not valid any more: {version} was rolled back on 20" in text
    assert f"by ana to {world.versions[0][:12]}: accuracy fell; request r-1 is queued" in text
    assert "salun certificate r-1 --out FILE" in text
    assert verify_certificate(path).certificate.predicate.request.id == "r-1"
    fetched = invoke("certificate", "r-1", "--out", world.folder / "again.json", "--store", world.store.uri)
    assert fetched.exit_code == 0
    assert f"not valid any more: {version} was rolled back" in fetched.stderr
    assert "salun request show r-1" in fetched.stderr


def test_with_a_key_at_hand_the_revocation_is_signed_and_known_offline(world):
    path = world.fetch("r-1")
    world.roll_back(reopen=True, signer=KEY)
    (key,) = world.revocations("r-1")
    addendum = world.folder / "revocation.json"
    addendum.write_bytes(world.store.get(key).data)
    text = refused(path, None, addenda=[addendum])
    assert "is revoked" in text
    assert "accuracy fell" in text
    forged = json.loads(addendum.read_bytes())
    forged["signatures"][0]["sig"] = "A" * 86 + "=="
    addendum.write_text(json.dumps(forged))
    assert "is revoked" not in refused(path, None, addenda=[addendum])


def test_a_purge_signs_the_revocation_that_a_rollback_could_not(world):
    world.roll_back(reopen=True)
    for _ in range(2):
        world.purge()
        assert len(world.revocations("r-1")) == 1
    world.certify("r-1", world.versions[0], nothing)  # the next sweep finds it gone
    world.purge()
    assert len(world.revocations("r-1")) == 1  # of the earlier certificate only


def test_a_version_in_use_is_never_revoked(world):
    fields = ("faces", world.versions[1], world.versions[0], "ana", "a try that failed", utc_clock)
    record_rollback(world.store, new_rollback(*fields))  # died before HEAD moved
    world.purge()
    assert world.revocations("r-1") == []
    assert verify_certificate(world.fetch("r-1"), store_uri=world.store.uri).in_store


def test_a_revocation_that_cannot_be_written_does_not_fail_the_rollback(world, monkeypatch):
    def denied(*_args):
        raise StoreError("may not write addenda")

    monkeypatch.setattr("salun_core.sweeps.rollback.revoke", denied)
    assert world.roll_back(reopen=True, signer=KEY).head.version == world.versions[0]


def test_a_rollback_without_a_record_is_seen_by_the_lineage(world):
    path = world.fetch("r-1")
    roll_back(world.store, "faces", world.versions[0], world.versions[1])
    text = refused(path, world.store)
    assert "is not in the lineage of HEAD, and no rollback of it is recorded" in text
    assert "salun request reopen r-1" in text


def test_a_reopened_request_has_no_valid_certificate(world):
    path = world.fetch("r-1")
    world.ledger.reopen("r-1", "ana", "by mistake")
    assert "request r-1 is queued since" in refused(path, world.store)
    assert "by mistake" in refused(path, world.store)


def test_a_request_that_found_nothing_in_an_undone_version_is_reopened_too(world):
    world.settle("r-2", "run-8", Outcome.NOTHING_TO_ERASE)
    world.certify("r-2", world.versions[1], nothing)
    done = world.roll_back(reopen=True)
    assert sorted(done.reopened) == ["r-1", "r-2"]
    assert "was rolled back" in refused(world.fetch("r-2"), world.store)


def test_an_earlier_certificate_of_the_request_is_superseded(world):
    path = world.fetch("r-1")
    other = Ed25519PrivateKey.from_private_bytes(bytes(reversed(range(32))))
    manifest = read_version(world.store, "faces", world.versions[1])
    documents = judged(evidence_of(weights_digest({name: item.sha256 for name, item in manifest.files.items()})))
    version = Version(world.versions[1], manifest)
    fields = {"request": world.ledger.get("r-1"), "completed_at": utc_clock().isoformat(), "documents": documents}
    newer = issue(world.store, *input_of(**fields, version=version, frozen_digest=None), other)
    assert verify_certificate(path, store_uri=world.store.uri).superseded_by == newer


def test_a_certificate_of_another_store_is_refused(world):
    path = world.fetch("r-1")
    world.store.delete(certificate_key("r-1"))
    assert "is not of this store" in refused(path, world.store)


def listed_as_undone():
    return [row["id"] for row in json.loads(invoke("request", "list", "--json").stdout) if row["undone"]]


def test_the_command_says_what_was_checked_and_what_comes_next(world, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", world.store.uri)
    path = world.fetch("r-1")
    assert "not known offline: give --store" in invoke("verify", path).stdout
    good = invoke("verify", path, "--store", world.store.uri)
    assert (good.exit_code, "the store still uses the version" in good.stdout) == (0, True), good.stderr
    assert "undone" not in json.loads(invoke("request", "show", "r-1", "--json").stdout)
    assert listed_as_undone() == []
    roll_back(world.store, "faces", world.versions[0], world.versions[1])  # as a release did that reopened nothing
    bad = invoke("verify", path, "--store", world.store.uri)
    assert (bad.exit_code, bad.stdout) == (5, "")
    shown = invoke("request", "show", "r-1")
    assert "its erasure is undone: faces@" in shown.stdout
    assert 'next: salun request reopen r-1 --reason "..."' in shown.stdout
    assert listed_as_undone() == ["r-1"]
    assert "completed: unlearned, undone" in " ".join(invoke("request", "list").stdout.split())
    assert invoke("request", "reopen", "r-1", "--reason", "rolled back").exit_code == 0
    assert "undone" not in invoke("request", "show", "r-1").stdout
    assert listed_as_undone() == []


def test_the_command_lists_and_fetches_revocations(world, monkeypatch):
    monkeypatch.setenv("SALUN_STORE_URI", world.store.uri)
    world.roll_back(reopen=True, signer=KEY)
    path = world.folder / "c.json"
    shown = invoke("certificate", "r-1", "--addenda", "--out", path)
    assert shown.exit_code == 0, shown.stderr
    assert "the certificate is revoked since" in shown.stdout
    (addendum,) = world.folder.glob("c.revocation-*.json")
    assert invoke("verify", path, "--addendum", addendum).exit_code == 5
    rows = json.loads(invoke("certificate", "r-1", "--addenda", "--json").stdout)["addenda"]
    assert rows[0]["revocation"]["reason"] == "accuracy fell"
