"""The policies of manifests/iam/ on a real server: the rights of each role, and that its steps need no more.

SeaweedFS takes the documents as they are: `s3.config` lists them under `policies`, and identities name them.
"""

import json
import re
import subprocess
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import boto3.session
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from salun_core.data.targets import SubjectTarget
from salun_core.errors import StoreError
from salun_core.registry import lookup, versions
from salun_core.requests.gauges import GaugeReader
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import Status
from salun_core.retention.inventory import scan_store
from salun_core.steps.claim import probe_once
from salun_core.steps.outcome import RunState, new_outcome, read_outcome, write_outcome
from salun_core.storage import erase
from salun_core.storage import keys as names
from salun_core.storage import seaweedfs as weed
from salun_core.storage.keys import LAYOUT, RUN_FILES
from salun_core.storage.leases import acquire, release, renew
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.runs import RunLog, RunStatus
from tests.support.decisions import PROCEDURE
from tests.support.toy_line import run_record

pytestmark = pytest.mark.s3
IAM = Path(__file__).parents[2] / "manifests" / "iam"
ROLES = sorted(path.stem for path in IAM.glob("*.json"))
BUCKET, A, B = "salun", "a" * 64, "b" * 64
NOW = datetime(2026, 1, 31, tzinfo=UTC)
KEYS = {
    "head": names.head_key("faces"),
    "manifest": names.version_key("faces", A),
    "disposed": names.version_disposal_key("faces", A),
    "rollback": names.version_rollback_key("faces", A),
    "blob": names.blob_key(A),
    "delta": names.delta_key(A),
    "request": names.request_key("r-1"),
    "event": names.event_key("r-1", 1),
    "record": names.run_key("run-1", "run.json"),
    "outcome": names.run_key("run-1", "outcome.json"),
    "mark": names.run_key("run-1", "disposed-data.json"),
    "report": names.run_key("run-1", "report.html"),
    "run event": names.run_event_key("run-1", 1),
    "mask": names.run_key("run-1", "mask.safetensors"),
    "candidate": names.run_key("run-1", "model.safetensors"),
    "scratch": names.scratch_key("run-1", "forget.json"),
    "certificate": names.certificate_key("r-1"),
    "addendum": names.addendum_key("r-1", "disposal.json"),
    "lease": names.lease_key("faces"),
    "hold": names.version_hold_key("faces", A),
    "index": names.index_key("queued", "faces", 1, 1, "r-1"),
    "work": names.work_key(A),
    "trash": names.trash_key(A, "0123456789abcdef.blob"),
    "probe": "probe/passed.json",
    "stranger": "policies/mine.yaml",
}
RUN = {"record", "outcome", "mark", "report", "run event", "mask", "candidate"}
LINE = {"head", "manifest", "disposed", "rollback"}
WEIGHTS = {"blob", "delta"}
_AT_WORK = {"run event", "lease", "outcome"}
_SETTLED = _AT_WORK | {"request", "event", "index", "certificate", "addendum", "work"}
_PUBLISHED = {"head", "manifest", *WEIGHTS, "report"}
_GONE = {
    "blob",
    "delta",
    "mask",
    "candidate",
    "outcome",
    "scratch",
    "trash",
    "probe",
    "manifest",
    "disposed",
    "rollback",
}
READ = {
    "submitter": {"request", "event", "index", "outcome"},
    "claimer": {*KEYS} - {"hold", "trash", "stranger"},
    "fetcher": {*LINE, *WEIGHTS, *RUN, "scratch", "lease"},
    "worker": {*LINE, *WEIGHTS, *RUN, "scratch", "lease"},
    "evaluator": {*LINE, *WEIGHTS, *RUN, "scratch", "lease"},
    "publisher": {*KEYS} - {"hold", "trash", "probe", "stranger"},
    "sweeper": {*KEYS} - {"hold", "trash", "stranger"},
    "settler": {*KEYS} - {"hold", "delta", "trash", "probe", "stranger"},
    "purger": {*KEYS} - {"scratch", "index", "work", "probe", "stranger"},
    "exporter": {"head", "manifest", "event"},
    "auditor": {*LINE, *RUN, "event", "certificate", "addendum"},
    "operator": {*LINE, *WEIGHTS, *RUN, "request", "event", "index", "lease", "hold"},
}
WRITE = {
    "submitter": {"request", "event", "index"},
    "claimer": {*_SETTLED, "record", "scratch", "probe"},
    "fetcher": {"lease", "outcome", "scratch"},
    "worker": _AT_WORK | {"scratch"},
    "evaluator": _AT_WORK | {"scratch"},
    "publisher": _SETTLED | _PUBLISHED,
    "sweeper": _SETTLED | _PUBLISHED | {"record", "scratch", "probe"},
    "settler": _SETTLED,
    "purger": {"blob", "delta", "trash", "request", "mark", "disposed", "addendum"},
    "exporter": set(),
    "auditor": set(),
    "operator": {"head", "rollback", "event", "index", "lease", "hold"},
}
DELETE = {
    "submitter": {"index"},
    "claimer": {"index", "scratch", "probe"},
    "publisher": {"index", "scratch"},
    "sweeper": {"index", "scratch", "probe"},
    "settler": {"index", "scratch"},
    "purger": _GONE,
    "operator": {"index", "hold"},
}
DELETE_VERSION = {"purger": _GONE | {"request", "head", "hold", "lease", "index"}}
FOLDERS = sorted({key.split("/")[0] for key in KEYS.values()})


def policy(role):
    return json.loads((IAM / f"{role}.json").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Clients by role, of a server that keeps versions; and `admin`, who may do all."""
    folder = tmp_path_factory.mktemp("iam")
    identities = [{"name": role, "credentials": [_key(role)], "policyNames": [role]} for role in ROLES]
    identities.append({"name": "admin", "credentials": [_key("admin")], "actions": ["Admin", "Read", "Write", "List"]})
    policies = [{"name": role, "content": (IAM / f"{role}.json").read_text()} for role in ROLES]
    (folder / "s3.json").write_text(json.dumps({"identities": identities, "policies": policies}))
    try:
        binary = weed.find_binary()
    except StoreError as error:
        pytest.skip(str(error))
    ports = weed.free_ports(None)
    process = weed.launch(binary, folder, BUCKET, ports)
    try:
        made = partial(_client, f"http://127.0.0.1:{ports['s3.port']}")
        clients = {role: made(role) for role in (*ROLES, "admin")}
        _wait(clients["admin"])
        clients["admin"].put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        yield clients
        for client in clients.values():
            client.close()  # the server waits for open connections, before it is killed after 20 seconds
    finally:
        weed.stop(process, ports)


def _key(role):
    return {"accessKey": f"key-{role}", "secretKey": f"secret-{role}"}


def _client(endpoint, role):
    key = _key(role)
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key["accessKey"],
        aws_secret_access_key=key["secretKey"],
        config=Config(retries={"total_max_attempts": 1}, proxies={}),
    )


def _wait(client):
    for _ in range(600):
        try:
            client.head_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server did not become ready")


@pytest.fixture
def stores(server):
    """A store for each role, in the bucket itself."""
    return {role: S3Store(BUCKET, client=client) for role, client in server.items()}


def allowed(call, **arguments):
    """Return whether the server lets a client do something; that the object is missing is no refusal."""
    try:
        call(Bucket=BUCKET, **arguments)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status not in {403, 404}:
            raise
        return status == 404
    return True


def test_the_matrix_has_every_kind_of_key():
    assert {*KEYS} - {"stranger"} == {*LAYOUT, *RUN_FILES}
    assert {*READ} == {*WRITE} == {*ROLES}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_only_these_rights(role, server):
    client, admin = server[role], server["admin"]
    for key in KEYS.values():
        admin.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    version = "0" * 32
    may = {
        "read": {kind for kind, key in KEYS.items() if allowed(client.get_object, Key=key)},
        "write": {kind for kind, key in KEYS.items() if allowed(client.put_object, Key=key, Body=b"{}")},
        "delete": {kind for kind, key in KEYS.items() if allowed(client.delete_object, Key=key)},
        "delete version": {
            kind for kind, key in KEYS.items() if allowed(client.delete_object, Key=key, VersionId=version)
        },
    }
    assert may == {
        "read": READ[role],
        "write": WRITE[role],
        "delete": DELETE.get(role, set()),
        "delete version": DELETE_VERSION.get(role, set()),
    }


@pytest.mark.parametrize("role", ROLES)
def test_a_role_lists_what_it_reads(role, server):
    """Without the right to list, S3 answers 403 for a key that is missing, and our readers rely on the 404."""
    listed = {folder for folder in FOLDERS if allowed(server[role].list_objects_v2, Prefix=f"{folder}/")}
    read = {KEYS[kind].split("/")[0] for kind in READ[role]}
    more = {"purger": {*FOLDERS}, "exporter": {"index", "blobs", "deltas"}}  # keys are all that it needs of these
    assert listed == read | more.get(role, set())
    assert allowed(server[role].list_objects_v2, Prefix="") == (role == "purger")
    assert allowed(server[role].list_object_versions, Prefix="requests/") == (role == "purger")


@pytest.mark.parametrize("role", ROLES)
def test_no_role_changes_the_rules(role, server):
    client, head = server[role], KEYS["head"]
    open_to_all = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [open_to_all]})
    assert not allowed(client.put_bucket_policy, Policy=document)
    assert not allowed(client.put_bucket_versioning, VersioningConfiguration={"Status": "Suspended"})
    assert not allowed(client.put_object_acl, Key=head, ACL="public-read")
    if role in {"fetcher", "worker", "evaluator"}:
        source = {"CopySource": f"{BUCKET}/{KEYS['request']}"}
        assert not allowed(client.copy_object, Key=names.run_event_key("run-1", 7), **source)


@pytest.mark.parametrize("role", ROLES)
def test_conditional_write_needs_get_and_put(role):
    """If-Match on AWS needs s3:GetObject beside s3:PutObject."""
    assert WRITE[role] <= READ[role] | {"probe"}


@pytest.mark.parametrize(("settles", "number"), [("publisher", 8), ("settler", 9), ("sweeper", 7)])
def test_the_steps_of_each_role_do_their_work(settles, number, stores, tmp_path):
    """From the request to the purge, each step with the rights of its role alone.

    The publisher settles its own run. The exit handler does it with a settler's rights if the run broke off, and the
    compact sweep does all in one step.
    """
    line, request, run = f"people-{number}", f"r-{number}", f"run-{number}"
    mine = dict.fromkeys(stores, stores["sweeper"]) if settles == "sweeper" else stores
    files = {"model.json": tmp_path / "model.json"}
    files["model.json"].write_text("{}")
    fields = {"line": line, "method": "train", "lineage": {"trained_on": 9}}
    first, _ = versions.stage_version(mine["publisher"], fields, files)
    versions.publish_head(mine["publisher"], line, first, None, None)
    Ledger(stores["submitter"], lambda: NOW).submit(request, line, SubjectTarget(subject_ref="person-07"))

    def says(role, state=RunState.RUNNING):
        return write_outcome(mine[role], new_outcome(run, line, state, f"{role} works", step=role))

    probe_once(mine["claimer"])
    lease = acquire(mine["claimer"], line, run, 600)
    says("claimer")
    ledger = Ledger(mine["claimer"], lambda: NOW)
    (state,) = ledger.list(line, [Status.QUEUED])
    ledger.move(state, Transition(Status.IN_PROGRESS, "sweep", "claimed", run=run, epoch=lease.epoch))
    member = {"id": request, "event": 2, "attempt": 1, "forget_digest": A, "salt": "0" * 32, "found": 1, "named": 1}
    record = run_record(run, first, NOW.isoformat(), line=line, members=[member])
    RunLog(mine["claimer"], lambda: NOW).start(record, "sweep")
    mine["claimer"].put_new(names.scratch_key(run, "forget.json"), b"[]")

    for role in ("fetcher", "worker", "evaluator", "publisher"):  # each step downloads the model before once
        version = lookup.resolve(mine[role], line)[1]
        versions.fetch_version(mine[role], line, version, tmp_path / f"before-{role}")
    sizes = {"small": 1, "large": 33 * 2**20}  # the large one goes in parts
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    done = {*ROLES} if settles == "settler" else set()  # with the publisher, each of the others sends a large file
    handed_on = "forget.json"
    for role, status in (
        ("fetcher", RunStatus.CLAIMED),
        ("worker", RunStatus.MASKING),
        ("worker", RunStatus.UNLEARNING),
        ("evaluator", RunStatus.EVALUATING),
        ("publisher", RunStatus.GATED),
    ):
        says(role)
        renew(mine[role], lease)
        mine[role].download(names.scratch_key(run, handed_on), tmp_path / "before")
        if role != "publisher":
            handed_on = f"{role}-{status}"
            account = "sweeper" if settles == "sweeper" else role
            mine[role].upload(tmp_path / ("small" if account in done else "large"), names.scratch_key(run, handed_on))
            done.add(account)
        if role != "fetcher":
            RunLog(mine[role], lambda: NOW).advance(run, status, role, "goes on")
    files["model.json"].write_text('{"after": true}')
    fields |= {"parent": first, "method": "salun", "run": run}
    second, _ = versions.stage_version(mine["publisher"], fields, files)
    versions.publish_head(mine["publisher"], line, second, first, run)

    ledger = Ledger(stores[settles], lambda: NOW)
    stores[settles].put_new(names.certificate_key(request), b"{}")
    ledger.move(
        request, Transition(Status.COMPLETED, "sweep", "erased", run=run, outcome="unlearned", assurance=PROCEDURE)
    )
    redact_request(stores[settles], request, keep_hashes=False)
    RunLog(stores[settles], lambda: NOW).advance(run, RunStatus.PUBLISHED, "settle", "published")
    stores[settles].delete(names.scratch_key(run, "forget.json"))
    release(stores[settles], line, run)
    says(settles, RunState.PUBLISHED)
    says("settler", RunState.KILLED)  # the exit handler comes last, and the first final outcome stays

    assert read_outcome(stores["submitter"], run).state is RunState.PUBLISHED
    assert read_outcome(stores["submitter"], "run-that-waits") is None
    assert GaugeReader(stores["exporter"], lambda: NOW).take().lines[line].runs == 0
    assert [event.to_status for event in Ledger(stores["auditor"], lambda: NOW).events(request)][-1] == "completed"
    assert len(lookup.ancestry(stores["auditor"], line)) == 2


def test_only_the_purger_deletes_versions(stores, server):
    """In a bucket that keeps versions, what a settler deletes is only hidden."""
    key = names.scratch_key("run-3", "forget.json")
    stores["claimer"].put_new(key, b"who it was")
    version = server["admin"].list_object_versions(Bucket=BUCKET, Prefix=key)["Versions"][0]["VersionId"]
    stores["settler"].delete(key)
    assert stores["settler"].get(key) is None
    assert server["admin"].get_object(Bucket=BUCKET, Key=key, VersionId=version)["Body"].read() == b"who it was"
    for role in {*ROLES} - {"purger"}:
        assert not allowed(server[role].delete_object, Key=key, VersionId=version), role
    erase.erase(stores["purger"], key)
    assert erase.versions_of(stores["purger"], key) == []


def test_the_purger_scans_everything(stores, server):
    for key in KEYS.values():  # what the matrix left is no document
        server["admin"].delete_object(Bucket=BUCKET, Key=key)
    inventory = scan_store(stores["purger"], NOW)
    assert inventory.uploads == []


@pytest.mark.parametrize(
    ("role", "doing"),
    [
        ("evaluator", lambda store: store.put_new(names.blob_key(B), b"weights")),
        ("evaluator", lambda store: store.put_new(names.head_key("new"), b"{}")),
        ("evaluator", lambda store: store.put_new(names.certificate_key("r-2"), b"{}")),
        ("worker", lambda store: store.get(names.request_key("r-1"))),
        ("fetcher", lambda store: store.put_new(names.head_key("new"), b"{}")),
        ("submitter", lambda store: store.get(names.run_key("run-1", "run.json"))),
        ("submitter", lambda store: store.put_new(names.run_key("run-2", "outcome.json"), b"{}")),
        ("publisher", lambda store: store.delete(names.blob_key(A))),
        ("exporter", lambda store: store.put_new(names.index_key("queued", "faces", 1, 1, "r-2"), b"{}")),
        ("auditor", lambda store: store.get(names.request_key("r-1"))),
        ("settler", lambda store: store.delete(names.blob_key(A))),
    ],
)
def test_a_refusal_names_the_action_and_no_secret(role, doing, stores):
    with pytest.raises(StoreError, match=r"not allowed to do that \(AccessDenied\)") as refused:
        doing(stores[role])
    assert "secret-" not in str(refused.value)


def rights(role):
    """What a policy grants: patterns of keys by the short name of the right."""
    named = {
        "s3:GetObject": "reads",
        "s3:PutObject": "writes",
        "s3:DeleteObject": "deletes",
        "s3:DeleteObjectVersion": "erases",
    }
    found = dict.fromkeys(named.values(), "")
    for statement in policy(role)["Statement"]:
        patterns = ", ".join(f"`{resource.partition(f'{BUCKET}/')[2]}`" for resource in statement["Resource"])
        for action in statement["Action"]:
            found |= {named[action]: patterns} if action in named else {}
    return found


def row(role):
    return f"| {role} | {' | '.join(text or '-' for text in rights(role).values())} |"


def test_the_readme_table_matches_the_policies():
    rows = [line for line in (IAM / "README.md").read_text().splitlines() if re.match(r"\| [a-z]+ \|", line)]
    assert [line for line in rows if not line.startswith("| role ")] == [row(role) for role in ROLES]


def test_the_readme_command_sets_bucket_and_prefix(tmp_path):
    command = re.search(r"^    (sed -E .*)$", (IAM / "README.md").read_text(), re.MULTILINE).group(1)
    for role in ROLES:
        target = tmp_path / f"{role}.json"
        with target.open("w") as file:
            script = command.replace("manifests/iam/ROLE.json", str(IAM / f"{role}.json"))
            subprocess.run(["bash", "-c", script], stdout=file, check=True)
        before, after = policy(role), json.loads(target.read_text())
        text = json.dumps(before).replace("arn:aws:s3:::salun/", "arn:aws:s3:::models/production/")
        expected = json.loads(text.replace('"arn:aws:s3:::salun"', '"arn:aws:s3:::models"'))
        for statement in expected["Statement"]:
            if "Condition" in statement:
                like = statement["Condition"]["StringLike"]
                like["s3:prefix"] = [f"production/{prefix}" for prefix in like["s3:prefix"]]
        assert after == expected
