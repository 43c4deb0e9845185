"""What earlier releases left in Kubeflow's store: found by what it is, and removed without touching a neighbour."""

import json
import secrets
import uuid
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from salun_core.certificates.statement import DisposalAddendum, open_statement
from salun_core.data.targets import SamplesTarget
from salun_core.errors import StoreError, UsageError
from salun_core.evaluation.evidence import Evidence, Forgotten, Integrity, Measured, Metric
from salun_core.gate import decide, load_policy
from salun_core.report import ReportContext, render_report
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from salun_core.retention.pipeline_root import (
    SMALL,
    UNFINISHED,
    RootScan,
    classify_content,
    find_place,
    scan_pipeline_root,
)
from salun_core.retention.purge import purge
from salun_core.retention.rules import DeletionKind
from salun_core.storage import keys as names
from salun_core.storage import open_pipeline_root, open_store
from salun_core.storage.erase import stored_keys
from salun_core.storage.leases import acquire
from salun_core.storage.s3 import S3Store, make_client
from salun_core.sweeps.runs import RunLog, RunMember, RunRecord, RunStatus

NOW = datetime.now(UTC).replace(microsecond=0)
SIGNER = Ed25519PrivateKey.generate()
SAMPLES = ["face-of-ana", "face-of-bo"]
WEIGHTS = save({"w": np.arange(3000, dtype=np.float32)})
MASK = save({"w": np.arange(30, dtype=np.uint8)}, metadata={"format": "salun.mask/v1"})
SPLIT = json.dumps({"format": "salun.split/v1", "train": SAMPLES}).encode()
REFERENCE = json.dumps(
    {
        "format": "salun.reference/v1",
        "kind": "model",
        "uri": "s3://models/scratch/run/model/0123456789abcdef",
        "files": {"model.safetensors": {"sha256": "0" * 64, "size": 1}},
    }
).encode()
EVIDENCE = Evidence(
    created_at="2026-01-02T03:04:05Z",
    measured=Measured(**dict.fromkeys(("before", "after", "dataset", "split", "forget_set"), "a" * 64)),
    forgotten=Forgotten(count=1, train_count=9, kinds=["samples"]),
    integrity=Integrity(weights=10, weights_changed=5, frozen_changed=0, non_finite=0, buffers_changed=0),
    metrics={"UA": Metric(before=0.0, after=1.0, n=10)},
)


def uid():
    return str(uuid.uuid4())


def artifact(run, task, output, pipeline="salun-unlearning"):
    """The key of an output as Kubeflow lays it out."""
    return f"{pipeline}/{run}/{task}/{uid()}/{output}"


class Root:
    """The pipeline root of a Kubeflow in a bucket that keeps versions."""

    def __init__(self, make_client):
        self.make_client, client = make_client, make_client()
        self.bucket = f"mlpipeline-{secrets.token_hex(4)}"
        client.create_bucket(Bucket=self.bucket)
        client.put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration={"Status": "Enabled"})
        self.uri = f"s3://{self.bucket}/v2/artifacts"
        self.store = open_pipeline_root(self.uri)

    def put(self, key, *bodies):
        client, bucket, prefix = self.store.native
        for body in bodies:
            client.put_object(Bucket=bucket, Key=prefix + key, Body=body)
        return key

    def unfinished(self, key):
        client, bucket, prefix = self.store.native
        made = client.create_multipart_upload(Bucket=bucket, Key=prefix + key)
        part = {"Bucket": bucket, "Key": prefix + key, "UploadId": made["UploadId"], "PartNumber": 1}
        client.upload_part(**part, Body=WEIGHTS)

    def old_run(self, run, pipeline="salun-unlearning"):
        """Everything that a run of release 0.1.0 left; returns the keys that may stay."""
        for output, task in (("model", "fetch-model"), ("unlearned", "unlearn")):
            folder = artifact(run, task, output, pipeline)
            self.put(f"{folder}/model.safetensors", WEIGHTS)
            self.put(f"{folder}/split.json", SPLIT)
            self.put(f"{folder}/model.json", b'{"format": "salun.model/v1"}')
        self.put(artifact(run, "compute-mask", "mask", pipeline), MASK)
        self.put(artifact(run, "evaluate", "evidence", pipeline), EVIDENCE.model_dump_json().encode())
        return self.harmless(run, pipeline)

    def harmless(self, run, pipeline="salun-unlearning"):
        decision = decide(EVIDENCE, load_policy("classifier"))
        context = ReportContext(title="SalUn", model_line="faces", created_at="2026-01-02T03:04:05Z")
        page = render_report(EVIDENCE, decision, context).encode()
        return {
            self.put(artifact(run, "gate-publish", "decision", pipeline), decision.model_dump_json().encode()),
            self.put(artifact(run, "gate-publish", "report", pipeline), page + b" " * SMALL),
            self.put(artifact(run, "evaluate", "metrics", pipeline), b'{"UA": 1.0}'),
            self.put(artifact(run, "evaluate", "executor-logs", pipeline), b"epoch 1\n" * SMALL),
        }

    def keys(self):
        return {item.key for item in stored_keys(self.store)}

    def found(self):
        return scan_pipeline_root(self.store, NOW + timedelta(days=1)).kept

    def rows(self):
        return sorted((item.place.task, item.place.output, item.kind, item.versions) for item in self.found())


@pytest.fixture
def root(memory_s3):
    return Root(memory_s3.client)


@pytest.fixture
def real_root(s3_server):
    return Root(make_client)


def foreign(root, run):
    """Files of other teams and of other programs, with names as close to ours as they can be."""
    other = uid()
    keys = [
        artifact(other, "train", "model", "faces-training") + "/model.safetensors",
        artifact(other, "salun-unlearning", "model", "faces-training") + "/model.safetensors",
        artifact(other, "compute-mask", "mask", "salunar-landing"),
        artifact(other, "unlearn", "unlearned", "not-salun-unlearning") + "/model.safetensors",
        f"faces/run-99/salun-unlearning/{uid()}/model/model.safetensors",
        f"{other}/salun-unlearning/notes/model.safetensors",
        "salun-unlearning/readme/model.safetensors",
        "salun-unlearning/model.safetensors",
        f"salun-models/scratch/{run}/model/model.safetensors",  # a store of ours under the same root
        f"salun-models/runs/{run}/mask.safetensors",
    ]
    for key in keys:
        root.put(key, WEIGHTS, WEIGHTS)
    return set(keys)


def test_old_artifacts_are_found_by_what_they_are_and_references_are_not(real_root):
    root = real_root
    run = uid()
    root.old_run(run)
    root.put(artifact(run, "score-shard", "sums", "salun-sharded-mask-cpu"), WEIGHTS)
    root.put(artifact(run, "claim-requests", "notes"), json.dumps({"ids": SAMPLES}).encode())
    root.put(artifact(run, "claim-requests", "batch"), json.dumps({"format": "salun.forget-set/v1"}).encode())
    root.put(artifact(run, "evaluate", "samples") + "/face-of-ana.png", b"\x89PNG\0")
    root.put(artifact(run, "evaluate", "table"), b"id,loss\n" * SMALL)
    root.put(f"salun-unlearning/{run}/compute-mask/mask", MASK)  # older releases of Kubeflow
    root.put(f"namespace/team/pipeline/salun-unlearning/{run}/unlearn/{uid()}/unlearned", WEIGHTS)
    root.unfinished(artifact(run, "unlearn", "unlearned") + "/model.safetensors")
    assert root.rows() == sorted(
        [
            ("fetch-model", "model", "model", 3),
            ("unlearn", "unlearned", "model", 3),
            ("compute-mask", "mask", "mask", 1),
            ("evaluate", "evidence", "evidence", 1),
            ("score-shard", "sums", "sums of a shard", 1),
            ("claim-requests", "notes", "other data", 1),
            ("claim-requests", "batch", "forget set", 1),
            ("evaluate", "samples", "binary data", 1),
            ("evaluate", "table", "other data", 1),
            ("compute-mask", "mask", "mask", 1),
            ("unlearn", "unlearned", "model", 1),
            ("unlearn", "unlearned", UNFINISHED, 1),
        ]
    )
    assert {item.size for item in root.found() if item.kind == UNFINISHED} == {len(WEIGHTS)}


def test_a_root_with_references_measures_reports_and_other_teams_is_clean(root):
    run = uid()
    foreign(root, run)
    root.harmless(run)
    for task, output in (("fetch-model", "model"), ("compute-mask", "mask"), ("evaluate", "evidence")):
        root.put(artifact(run, task, output), REFERENCE)
    root.put(artifact(run, "conclude", "summary"), b"# Refused\n\nUA is 0.2.")
    root.put(artifact(run, "merge-scores", "mask"), b"")
    assert scan_pipeline_root(root.store, NOW) == RootScan([], harmless=8, others=10)


def test_bytes_that_a_delete_or_a_reference_only_hides_are_found(root):
    run = uid()
    root.put(hidden := artifact(run, "compute-mask", "mask"), MASK, MASK)
    root.store.delete(hidden)
    root.put(artifact(run, "unlearn", "unlearned"), WEIGHTS, REFERENCE)
    root.put(gone := artifact(run, "unlearn", "unlearned"), REFERENCE)
    root.store.delete(gone)
    assert root.rows() == [("compute-mask", "mask", "mask", 2), ("unlearn", "unlearned", "model", 2)]


def test_all_pages_are_read(real_root):
    root, client = real_root, make_client()

    def shorten(params, **_):
        params["MaxKeys"] = 2

    client.meta.events.register("before-parameter-build.s3.ListObjectVersions", shorten)
    run = uid()
    root.old_run(run)
    expected = root.rows()
    assert len(expected) == 4
    root.store = S3Store(root.bucket, "v2/artifacts", client=client)
    assert root.rows() == expected


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("salun-x/{0}/task/{1}/mask", ("salun-x", "task", "mask")),
        ("salun-x/{0}/task/mask", ("salun-x", "task", "mask")),
        ("salun-x/{0}/weights.bin", ("salun-x", "", "weights.bin")),
        ("v2/artifacts/salun-x/{0}/task/{1}/model/split.json", ("salun-x", "task", "model")),
        ("namespace/n/pipeline/salun-x/{0}/task/mask", ("salun-x", "task", "mask")),
        ("v2/artifacts/salun-x/{0}/task/mask", None),  # a bucket, not a pipeline root: only sure with an execution
        ("faces/{0}/salun-x/{1}/mask", None),
        ("salun-x/task/mask", None),
        ("salun-x/{0}", None),
        ("{0}/task/{1}/mask", None),
    ],
)
def test_find_place(key, place):
    found = find_place(key.format(uid(), uid()))
    assert (found and (found.pipeline, found.task, found.output)) == place


def test_content_is_harmless_only_if_it_is_known():
    assert classify_content("report", b"<!DOCTYPE html><p>face-of-ana" + b"\n" * SMALL, SMALL + 29) == "other data"
    assert classify_content("mask", REFERENCE, SMALL + 1) == "other data"
    assert classify_content("mask", REFERENCE.replace(b"{", b"[", 1), len(REFERENCE)) == "other data"
    assert classify_content("mask", b'["salun.reference/v1"]', 22) == "other data"
    assert classify_content("note", "grün".encode()[:-2], 99) is None  # cut within a character
    assert classify_content("note", b"\xff\xfe", 2) == "binary data"


class Known:
    """A store that knows a run: it published, and the request that it erased has a certificate."""

    def __init__(self, store, line="faces"):
        self.store, self.line, self.run, self.request = store, line, uid(), f"r-{line}"

    def start(self, at=NOW):
        ledger, self.log = Ledger(self.store, lambda: at), RunLog(self.store, lambda: at)
        self.ledger = ledger
        ledger.submit(self.request, self.line, SamplesTarget(ids=SAMPLES[:1]), received_at=at)
        event = ledger.move(self.request, Transition(Status.IN_PROGRESS, "sweep", "claimed", run=self.run, epoch=1))
        facts = {"event": event.n, "attempt": 1, "forget_digest": "0" * 64, "salt": "0" * 32, "found": 1, "named": 1}
        member = RunMember(id=self.request, **facts)
        fields = {"run": self.run, "line": self.line, "parent": "1" * 64, "epoch": 1, "method": "salun", "density": 0.5}
        fields |= {"created_at": at.isoformat(), "work_key": "0" * 64, "members": [member.model_dump()]}
        self.log.start(RunRecord(**fields, forget_sha256="f" * 64, forget_count=1, train_count=9), "sweep")
        return self

    def publish(self):
        self.log.advance(self.run, RunStatus.PUBLISHED, "sweep", "published")
        self.store.put_new(names.certificate_key(self.request), b"a certificate")
        done = Transition(Status.COMPLETED, "sweep", "published", run=self.run, outcome=Outcome.UNLEARNED)
        self.ledger.move(self.request, done)
        return self

    def purge(self, root, **options):
        # Hours after the import, because uploads of this test have the time of the server.
        options = {"signer": SIGNER, "clock": lambda: NOW + timedelta(hours=6), "old_artifacts": True, **options}
        return purge(self.store, None, root.store, **options)

    def addenda(self):
        keys = [item.key for item in self.store.list(f"addenda/{self.request}/")]
        read = [open_statement(DisposalAddendum, self.store.get(key).data, [SIGNER.public_key()], key) for key in keys]
        return sorted(done.what for item in read for done in item.predicate.done)


OF_KUBEFLOW = "weights and masks under the pipeline root"


def test_exactly_what_was_found_is_removed_at_once_and_certified(root, store):
    known, unknown = Known(store).start().publish(), uid()
    store.put_new(scratch := names.scratch_key(known.run, "forget.json"), b"of today: not an artifact of Kubeflow")
    stays = foreign(root, known.run) | root.old_run(known.run) | root.old_run(unknown, "salun-deletion-sweep-cpu")
    root.put(hidden := artifact(unknown, "compute-mask", "mask"), MASK)
    root.store.delete(hidden)
    root.unfinished(artifact(unknown, "unlearn", "unlearned") + "/model.safetensors")
    found, before = root.found(), root.keys()
    foreign_versions = [item for item in stored_keys(root.store) if item.key in stays]
    with pytest.raises(UsageError, match="1 certificates need an addendum"):
        known.purge(root, signer=None)
    dry = known.purge(root, dry_run=True, signer=None)
    assert (root.keys(), root.found(), known.addenda()) == (before, found, [])
    report = known.purge(root)
    assert report.plan.deletions == dry.plan.deletions
    assert {item.kind for item in report.plan.deletions} == {DeletionKind.ARTIFACT}
    assert sorted(item.keys for item in report.plan.deletions) == sorted(item.keys for item in found)
    assert report.total.bytes == sum(item.size for item in found)
    assert root.found() == []
    assert [item for item in stored_keys(root.store) if item.key in stays] == foreign_versions
    assert root.keys() == stays
    assert store.get(scratch) is not None
    assert report.addenda == [known.request]
    assert known.addenda() == [OF_KUBEFLOW]
    again = known.purge(root, signer=None)
    assert (again.plan.deletions, again.addenda) == ([], [])


def test_runs_at_work_keep_their_artifacts(root, store):
    """A lease tells of a run without a log; a log without an end counts for a day."""
    working = Known(store, "one").start(NOW - timedelta(hours=17))
    dead = Known(store, "two").start(NOW - timedelta(hours=25))
    holding = uid()
    acquire(store, "three", holding, 3600)
    for run in (working.run, dead.run, holding):
        root.old_run(run)
    report = working.purge(root)
    assert report.plan.active == sorted([working.run, holding])
    assert {item.place.run for item in root.found()} == {working.run, holding}
    working.publish()
    working.purge(root)
    assert {item.place.run for item in root.found()} == {holding}


def test_a_certificate_is_extended_only_when_nothing_of_its_run_is_left(root, store):
    """An output with a name of its own counts too. It is written late here, and the next call finds it."""
    known = Known(store).start().publish()
    root.put(artifact(known.run, "unlearn", "unlearned"), WEIGHTS)
    late = artifact(known.run, "evaluate", "scores")

    def write_late(**_):
        root.make_client().put_object(Bucket=root.bucket, Key=f"v2/artifacts/{late}", Body=WEIGHTS)

    fragile = root.make_client()
    fragile.meta.events.register("before-call.s3.DeleteObject", write_late)
    whole, root.store = root.store, S3Store(root.bucket, "v2/artifacts", client=fragile)
    known.purge(root)
    assert known.addenda() == ["forget data of the run", "masks in the store"]  # of our store
    root.store = whole
    assert root.keys() == {late}
    assert known.purge(root).addenda == [known.request]
    assert OF_KUBEFLOW in known.addenda()


def test_a_purge_that_is_killed_between_two_keys_goes_on(root, store):
    known = Known(store).start().publish()
    stays = root.old_run(known.run)
    calls = []

    def die(**_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    fragile = root.make_client()
    fragile.meta.events.register("before-call.s3.DeleteObject", die)
    before = len(root.keys())
    whole, root.store = root.store, S3Store(root.bucket, "v2/artifacts", client=fragile)
    with pytest.raises(KeyboardInterrupt):
        known.purge(root)
    root.store = whole
    assert (len(root.keys()), known.addenda()) == (before - 1, [])
    assert known.purge(root).addenda == [known.request]
    assert root.keys() == stays


def test_old_artifacts_need_a_root(store):
    with pytest.raises(UsageError, match="give --pipeline-root"):
        purge(store, old_artifacts=True, signer=SIGNER)


def test_a_root_has_no_query():
    with pytest.raises(UsageError, match="SALUN_KFP_S3_REGION instead"):
        open_pipeline_root("s3://mlpipeline/v2/artifacts?region=eu-central-1")


def test_kubeflows_store_may_have_another_address_and_other_keys(real_root, monkeypatch):
    root = real_root
    ours = open_store(root.uri).endpoint
    monkeypatch.setenv("SALUN_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SALUN_S3_ACCESS_KEY_ID", "ours")
    monkeypatch.setenv("SALUN_S3_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("SALUN_S3_SESSION_TOKEN", "token")
    assert open_pipeline_root(root.uri).endpoint == "http://127.0.0.1:1"
    monkeypatch.setenv("SALUN_KFP_S3_ENDPOINT_URL", ours)
    client = open_pipeline_root(root.uri).native[0]
    assert client._request_signer._credentials.access_key == "ours"
    monkeypatch.setenv("SALUN_KFP_S3_ACCESS_KEY_ID", "any")
    with pytest.raises(StoreError, match="SALUN_KFP_S3_SECRET_ACCESS_KEY is not"):
        open_pipeline_root(root.uri)
    monkeypatch.setenv("SALUN_KFP_S3_SECRET_ACCESS_KEY", "any")
    opened = open_pipeline_root(root.uri)
    credentials = opened.native[0]._request_signer._credentials
    assert (opened.endpoint, credentials.access_key, credentials.token) == (ours, "any", None)
    assert open_store(root.uri).endpoint == "http://127.0.0.1:1"
