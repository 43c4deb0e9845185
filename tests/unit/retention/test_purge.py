"""Purging a store whose bucket keeps versions: what goes is gone, what stays is whole, a kill loses nothing.

The first test runs on the real server, the others on the one in memory.
"""

import json
import secrets
import threading
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save_file

from salun_core.certificates.statement import DisposalAddendum, open_statement
from salun_core.data.targets import RedactedTarget, SamplesTarget
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import ConflictError, IntegrityError, SalunError, UsageError
from salun_core.registry.holds import hold_version, read_disposal, release_version
from salun_core.registry.lookup import read_head, read_version
from salun_core.registry.versions import fetch_version, publish_head, stage_version
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from salun_core.retention import purge as step
from salun_core.retention.purge import purge
from salun_core.retention.rules import DeletionKind
from salun_core.storage import keys as names
from salun_core.storage import open_store
from salun_core.storage.erase import stored_keys, versions_of
from salun_core.storage.leases import acquire, release
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.runs import RunLog, RunMember, RunRecord, RunStatus
from tests.support.decisions import PROCEDURE
from tests.support.folder_model import UNET, contents, write_folder

START = datetime.now(UTC).replace(microsecond=0)
SIGNER = Ed25519PrivateKey.generate()


def after(**delta):
    return lambda: START + timedelta(**delta)


@pytest.fixture
def bucket(memory_s3):
    """A bucket that keeps versions."""
    return new_bucket()


def new_bucket():
    client = open_store("s3://salun").native[0]
    name = f"purge-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    return name


def files(folder, number):
    """Weights of which a fifth changes from version to version, the ids of the training samples, and evidence."""
    folder.mkdir(parents=True)
    weights = np.arange(20_000, dtype=np.float32)
    weights[: 4_000 * number] += 0.5
    save_file({"w": weights}, folder / "model.safetensors")
    (folder / "split.parquet").write_text(json.dumps([f"sample-{n}" for n in range(9 - number)]))
    (folder / "evidence.json").write_text(f"evidence {number}")
    return {path.name: path for path in folder.iterdir()}


class Line:
    """Three versions; run-2 made the second and erased request `r-1`."""

    def __init__(self, bucket, folder):
        self.store = open_store(f"s3://{bucket}/{secrets.token_hex(6)}")
        self.uri, self.files, self.versions = self.store.uri, [], []
        for number in range(3):
            self.files.append(files(folder / f"v{number}", number))
            self._publish(number)
        store, weights = self.store, self.files[0]["model.safetensors"]
        store.upload(weights, names.blob_key(self.digest(0)))  # once more: two S3 versions of the same bytes
        self._request()
        store.put_new("scratch/run-2/forget.json", b"sample-8")
        store.delete("scratch/run-2/forget.json")  # settled: hidden, not gone
        store.put_new("scratch/run-2/late.json", b"sample-8")
        store.put_new("scratch/run-x/forget.json", b"of a run that nobody knows")
        for name in ("model.safetensors", "mask.safetensors", "split.parquet"):
            store.put_new(f"scratch/run-x/{name}", b"of the same run, which had no requests")
        store.put_new("runs/run-idle/outcome.json", b"nothing to do")
        store.put_new("runs/run-2/outcome.json", b"published")
        store.put_new("runs/run-2/mask.safetensors", b"critical weights")
        store.put_new(names.blob_key(sha256_bytes(b"orphan")), b"orphan")
        store.put_new("holiday/photo.jpg", b"not ours")
        client, of, prefix = store.native
        client.create_multipart_upload(Bucket=of, Key=f"{prefix}blobs/sha256/x")

    def _publish(self, number):
        parent = self.versions[-1] if self.versions else None
        fields = {"line": "faces", "method": "salun", "parent": parent, "run": f"run-{number + 1}"}
        fields["created_at"] = (START - timedelta(hours=30 - number)).isoformat()
        digest, _ = stage_version(self.store, fields, self.files[number])
        publish_head(self.store, "faces", digest, parent, None)
        self.versions.append(digest)

    def _request(self):
        ledger, log = Ledger(self.store, after(hours=-28)), RunLog(self.store, after(hours=-28))
        ledger.submit("r-1", "faces", SamplesTarget(ids=["sample-8"]), received_at=START - timedelta(days=2))
        event = ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-2", epoch=1))
        member = RunMember(
            id="r-1", event=event.n, attempt=1, forget_digest="0" * 64, salt="0" * 32, found=1, named=1
        ).model_dump()
        fields = {"run": "run-2", "line": "faces", "parent": self.versions[0], "epoch": 1, "method": "salun"}
        fields |= {"density": 0.5, "created_at": START.isoformat(), "work_key": "0" * 64, "members": [member]}
        fields |= {"levels": [{"role": "retrain"}], "max_attempts": 1}
        log.start(RunRecord(**fields, forget_sha256="f" * 64, forget_count=1, train_count=9), "sweep")
        log.advance("run-2", RunStatus.PUBLISHED, "sweep", "published")
        self.store.put_new(names.certificate_key("r-1"), b"a certificate")
        ledger.move(
            "r-1",
            Transition(
                Status.COMPLETED, "sweep", "published", run="run-2", outcome=Outcome.UNLEARNED, assurance=PROCEDURE
            ),
        )

    def digest(self, number, name="model.safetensors"):
        return read_version(self.store, "faces", self.versions[number]).files[name].sha256

    def everything(self):
        return {item.key: (item.size, item.live, item.old) for item in stored_keys(self.store)}

    def fetched(self, number, folder):
        fetch_version(self.store, "faces", self.versions[number], folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def original(self, number):
        return {name: path.read_bytes() for name, path in self.files[number].items()}

    def purge(self, **options):
        return purge(self.store, **{"signer": SIGNER, "clock": after(days=40), **options})

    def traces(self, number):
        """Every S3 version of a version's weights and of its list of samples."""
        digests = [self.digest(number), self.digest(number, "split.parquet")]
        return [item for digest in digests for item in versions_of(self.store, names.blob_key(digest))]

    def addenda(self):
        keys = [item.key for item in self.store.list("addenda/r-1/")]
        read = [open_statement(DisposalAddendum, self.store.get(key).data, [SIGNER.public_key()], key) for key in keys]
        return sorted(done.what for item in read for done in item.predicate.done)


@pytest.fixture
def line(bucket, tmp_path):
    return Line(bucket, tmp_path / "line")


def test_a_purge_deletes_its_plan_and_keeps_the_rest_complete(s3_server, tmp_path):
    line = Line(new_bucket(), tmp_path / "line")
    hold_version(line.store, "faces", line.versions[1], "ana", "audit", after(days=1))
    assert len(line.traces(0)) == 3  # weights twice
    before = line.everything()
    with pytest.raises(UsageError, match=r"1 certificates need an addendum, and an unsigned one proves nothing"):
        line.purge(signer=None)
    dry = line.purge(dry_run=True, signer=None)
    assert line.everything() == before
    assert dry.erased == ()
    planned = {key for item in dry.plan.deletions for key in item.keys}
    assert {"scratch/run-2/forget.json", "runs/run-2/mask.safetensors", names.request_key("r-1")} <= planned
    report = line.purge()
    assert report.skipped == []
    assert [item for item, _ in report.erased] == dry.plan.deletions
    assert {item.kind for item, _ in report.erased} == {*DeletionKind} - {DeletionKind.STAGED}
    assert line.traces(0) == []
    assert line.fetched(2, tmp_path / "head") == line.original(2)
    assert line.fetched(1, tmp_path / "held") == line.original(1)
    with pytest.raises(SalunError):
        line.fetched(0, tmp_path / "gone")
    left = set(line.everything())
    assert not [key for key in left if key.startswith(("scratch/", "runs/run-2/mask"))]
    assert names.blob_key(sha256_bytes(b"orphan")) not in left
    assert {"runs/run-2/outcome.json", "runs/run-idle/outcome.json"} & left == {"runs/run-2/outcome.json"}
    assert {"holiday/photo.jpg", names.certificate_key("r-1"), names.event_key("r-1", 3)} <= left
    assert names.blob_key(line.digest(0, "evidence.json")) in left
    assert report.plan.unknown == ["holiday/photo.jpg"]
    assert report.plan.held == [f"faces@{line.versions[1]}"]
    record = read_disposal(line.store, "faces", line.versions[0])
    assert record.files == ["model.safetensors", "split.parquet"]
    assert record.size == sum(line.files[0][name].stat().st_size for name in record.files)
    assert read_head(line.store, "faces")[0].version == line.versions[2]


def test_a_lease_is_its_runs_own_until_it_is_given_back(line):
    acquire(line.store, "faces", "run-x", 1)
    assert step.scan_store(line.store, START).unreturned == {"run-x"}
    release(line.store, "faces", "run-x")
    assert step.scan_store(line.store, START).unreturned == frozenset()


def test_replaced_documents_go_with_their_month(line):
    """In a bucket that keeps versions: earlier leases and HEADs, and deleted entries of the index."""
    acquire(line.store, "faces", "run-7", 600)
    release(line.store, "faces", "run-7")
    index = [item.key for item in stored_keys(line.store, "index/") if not item.live]
    assert index
    head, lease = names.head_key("faces"), names.lease_key("faces")
    assert len(versions_of(line.store, head)) == 3
    line.purge(clock=after(days=29))
    assert len(versions_of(line.store, head)) == 3
    line.purge()
    assert [len(versions_of(line.store, key)) for key in (head, lease)] == [1, 1]
    assert [item for key in index for item in versions_of(line.store, key)] == []
    assert line.store.get(head) is not None
    assert line.store.get(lease) is not None


def test_old_weights_of_a_model_with_folders_are_purged(bucket, tmp_path):
    store = open_store(f"s3://{bucket}/{secrets.token_hex(6)}")
    versions, model = [], [write_folder(tmp_path / f"v{number}", 4000 * number) for number in range(2)]
    for number, made in enumerate(model):
        parent = versions[-1] if versions else None
        fields = {"line": "sd", "method": "salun", "parent": parent}
        fields["created_at"] = (START - timedelta(hours=30 - number)).isoformat()
        versions.append(stage_version(store, fields, made)[0])
        publish_head(store, "sd", versions[-1], parent, None)
    first = read_version(store, "sd", versions[0])
    report = purge(store, clock=after(days=40))
    assert [item.kind for item, _ in report.erased] == [DeletionKind.WEIGHTS, DeletionKind.HISTORY]
    assert read_disposal(store, "sd", versions[0]).files == [UNET]  # all else is HEAD's too
    assert versions_of(store, names.blob_key(first.files[UNET].sha256)) == []
    fetch_version(store, "sd", versions[1], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "v1")
    with pytest.raises(UsageError, match="no weights any more"):
        fetch_version(store, "sd", versions[0], tmp_path / "gone")


def test_deletions_are_added_to_the_certificate_and_the_target_is_redacted(line):
    key = names.request_key("r-1")
    assert line.purge(clock=after(days=1)).addenda == []  # the mask is still there
    target = Ledger(line.store, after()).get("r-1").target
    assert isinstance(target, RedactedTarget)
    assert len(target.hashes) == 1
    assert len(versions_of(line.store, key)) == 1
    report = line.purge()
    assert report.addenda == ["r-1"]
    store = ["forget data of the run", "masks in the store"]
    assert line.addenda() == [*store, "weights of the superseded version"]
    report = line.purge()
    assert (report.addenda, [item.kind for item in report.plan.deletions]) == ([], [DeletionKind.REQUEST])
    assert Ledger(line.store, after()).get("r-1").target.hashes == []  # no version knows it any more
    assert len(versions_of(line.store, key)) == 1
    before = line.everything()
    assert line.purge(signer=None).plan.deletions == []  # nothing to certify, so no key is needed
    assert line.everything() == before


class KilledError(BaseException):
    """Ends a purge as a kill would: nothing may catch it."""


def test_a_purge_killed_after_each_write_ends_the_same(line, bucket, memory_s3, tmp_path, monkeypatch):
    """Each attempt may write once, and more only where that brought it no further; a twin is purged without a kill."""
    twin = Line(bucket, tmp_path / "twin")
    assert twin.versions == line.versions
    for _ in range(2):
        twin.purge()
    calls, allowed, attempts, before = [], 1, 0, line.everything()

    def die(**_):
        calls.append(1)
        if len(calls) > allowed and threading.current_thread() is threading.main_thread():  # else it would hang
            raise KilledError

    fragile = S3Store(bucket, line.uri.partition(f"s3://{bucket}/")[2], client=memory_s3.client())
    for name in ("DeleteObject", "PutObject", "AbortMultipartUpload"):
        fragile.native[0].meta.events.register(f"before-call.s3.{name}", die)
    monkeypatch.setattr(line, "store", fragile)
    while attempts < 100:
        calls.clear()
        try:
            line.purge()
        except KilledError:
            attempts += 1
            now = line.everything()
            allowed = allowed + 1 if now == before else 1
            before = now
            continue
        if not calls:
            break
    assert 15 <= attempts < 100
    ours, other = line.everything(), twin.everything()
    assert {key for key in ours if "addenda" not in key} == {key for key in other if "addenda" not in key}
    assert line.addenda() == twin.addenda()
    for key in (names.version_disposal_key("faces", line.versions[0]), "runs/run-2/disposed-weights.json"):
        assert line.store.get(key).data == twin.store.get(key).data
    assert line.fetched(2, tmp_path / "head") == line.original(2)
    assert line.traces(0) == line.traces(1) == []


def test_a_hold_during_the_purge_is_respected_and_a_damaged_manifest_stops_it(line, monkeypatch, tmp_path):
    real = step.scan_store

    def meddled(store, now):
        inventory = real(store, now)
        hold_version(line.store, "faces", line.versions[0], "ana", "held meanwhile", after())
        return inventory

    monkeypatch.setattr(step, "scan_store", meddled)
    report = line.purge()
    assert {item.kind for item in report.skipped} == {DeletionKind.WEIGHTS, DeletionKind.ORPHAN}
    assert line.fetched(0, tmp_path / "held") == line.original(0)
    monkeypatch.undo()
    release_version(line.store, "faces", line.versions[0])
    line.store.delete(names.certificate_key("r-1"))
    line.purge(signer=None)  # nothing to certify
    assert line.traces(0) == []
    with pytest.raises(ConflictError, match="were deleted at"):
        hold_version(line.store, "faces", line.versions[0], "ana", "too late", after())
    client, of, prefix = line.store.native
    key = names.version_key("faces", line.versions[0])
    client.put_object(Bucket=of, Key=prefix + key, Body=canonical_json({"format": "salun.version/v1"}))
    line.store.put_new("scratch/run-y/forget.json", b"sample-1")
    with pytest.raises(IntegrityError, match="does not match its digest"):
        line.purge()
    assert line.store.get("scratch/run-y/forget.json") is not None
