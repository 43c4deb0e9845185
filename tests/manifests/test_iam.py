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
import numpy as np
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image
from typer.testing import CliRunner

from lab import seaweedfs as weed
from salun_core.certificates.keys import create_key
from salun_core.cli.app import app
from salun_core.data import DataSpec
from salun_core.data.split import read_split
from salun_core.data.targets import ClassTarget
from salun_core.errors import StoreError, UsageError
from salun_core.methods.classification import UnlearnConfig
from salun_core.pods import ends, steps
from salun_core.pods import pod as pods
from salun_core.pods.pod import Pod
from salun_core.pods.reference import write_reference
from salun_core.registry import lookup
from salun_core.requests.filing import file_requests
from salun_core.requests.schema import Submission
from salun_core.retention.inventory import scan_store
from salun_core.steps.outcome import RunState, read_outcome
from salun_core.storage import erase
from salun_core.storage import keys as names
from salun_core.storage.keys import LAYOUT, RUN_FILES
from salun_core.storage.s3 import S3Store
from salun_core.tasks.classification.training import train_model
from tests.support.card_line import begin_classifier

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
    "trash": names.trash_key(A, "0123456789abcdef"),
    "probe": "probe/passed.json",
    "stranger": "policies/mine.yaml",
}
RUN = {"record", "outcome", "mark", "report", "run event", "mask", "candidate"}
LINE = {"head", "manifest", "disposed", "rollback"}
_AT_WORK = {"run event", "lease", "outcome"}
_SETTLED = _AT_WORK | {"request", "event", "index", "certificate", "addendum", "work"}
_PUBLISHED = {"head", "manifest", "blob", "report"}
_GONE = {
    "blob",
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
    "submitter": {"request", "event", "index", "outcome", "head"},
    "claimer": {*KEYS} - {"hold", "trash", "stranger"},
    "fetcher": {*LINE, "blob", *RUN, "scratch", "lease"},
    "worker": {*LINE, "blob", *RUN, "scratch", "lease"},
    "evaluator": {*LINE, "blob", *RUN, "scratch", "lease"},
    "publisher": {*KEYS} - {"hold", "trash", "stranger"},
    "sweeper": {*KEYS} - {"hold", "trash", "stranger"},
    "settler": {*KEYS} - {"hold", "trash", "probe", "stranger"},
    "purger": {*KEYS} - {"scratch", "index", "work", "probe", "stranger"},
    "exporter": {"head", "manifest", "event"},
    "auditor": {*LINE, *RUN, "event", "certificate", "addendum"},
    "operator": {*LINE, "blob", *RUN, "request", "event", "index", "lease", "hold"},
}
WRITE = {
    "submitter": {"request", "event", "index"},
    "claimer": {*_SETTLED, "record", "scratch", "probe"},
    "fetcher": {"lease", "outcome", "scratch"},
    "worker": _AT_WORK | {"scratch"},
    "evaluator": _AT_WORK | {"scratch"},
    "publisher": _SETTLED | _PUBLISHED | {"probe"},
    "sweeper": _SETTLED | _PUBLISHED | {"record", "scratch", "probe"},
    "settler": _SETTLED,
    "purger": {"blob", "trash", "request", "mark", "disposed", "addendum"},
    "exporter": set(),
    "auditor": set(),
    "operator": {"head", "rollback", "event", "index", "lease", "hold"},
}
DELETE = {
    "submitter": {"index"},
    "claimer": {"index", "scratch", "probe"},
    "publisher": {"index", "scratch", "probe"},
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
    more = {"purger": {*FOLDERS}, "exporter": {"index", "blobs"}}  # keys are all that it needs of these
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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of random images, the weights of a classifier of them, and a policy that any model passes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(60):
        place = folder / "data" / f"c{number % 2}" / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place)
    config = UnlearnConfig(epochs=1, learning_rate=0.1, batch_size=64, device="cpu")
    train_model(DataSpec(source=str(folder / "data")), "resnet8", config, folder / "model")
    rule = {"metric": "RA", "op": ">=", "value": 0, "reason": "every model is published"}
    (folder / "policy.json").write_text(json.dumps({"name": "any", "rules": [rule]}))
    return folder


class Office:
    """People and pods, each with the keys of one role, which they find in the environment."""

    def __init__(self, server, patch, folder):
        self._endpoint, self._patch, self.folder = server["admin"].meta.endpoint_url, patch, folder
        self.uri = f"s3://{BUCKET}"

    def act_as(self, role):
        key = _key(role)
        given = {"ENDPOINT_URL": self._endpoint, "REGION": "us-east-1"}
        given |= {"ACCESS_KEY_ID": key["accessKey"], "SECRET_ACCESS_KEY": key["secretKey"]}
        for name, value in given.items():
            self._patch.setenv(f"SALUN_S3_{name}", value)

    def salun(self, role, *args):
        """Run `salun` and return what it printed."""
        self.act_as(role)
        result = CliRunner().invoke(app, [*args, "--store", self.uri])
        assert result.exit_code == 0, (role, args, result.output)
        return result.stdout

    def pod(self, role, line, run):
        self.act_as(role)
        return Pod(self.uri, line, run)

    def file(self, name, reference):
        """Keep the reference that a step returned, and return its file."""
        write_reference(reference, self.folder / name)
        return str(self.folder / name)


@pytest.fixture
def office(server, monkeypatch, tmp_path):
    monkeypatch.setattr(pods, "PAUSES", ())  # what is refused once is refused again
    key = create_key(tmp_path / "keys" / "salun")
    monkeypatch.setenv("SALUN_SIGNING_KEY", str(key.private))
    monkeypatch.setenv("SALUN_VERIFY_KEY", str(key.public))
    return Office(server, monkeypatch, tmp_path)


QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005})


def sweep_in_pods(office, line, run, form, report):
    """Let each pod of a sweep work with its own role, up to the verdict."""
    summary = str(office.folder / "summary.md")
    claimed = steps.claim(office.pod("claimer", line, run), form, summary)
    assert (claimed.requests, claimed.code) == (1, 0), claimed
    common = {name: form[name] for name in ("store_uri", "model_line", "policy_uri")}
    given = {**common, "forget_manifest_uri": claimed.forget_manifest_uri, "method_config": claimed.method_config}
    inputs, code = steps.fetch_model(office.pod("fetcher", line, run), given)
    assert code == 0
    worker = office.pod("worker", line, run)
    mask = steps.compute_mask(worker, office.file("inputs", inputs), "salun", 0.5, claimed.method_config)
    after = steps.unlearn(worker, office.file("mask", mask), "salun", claimed.method_config, 0)
    evaluator = office.pod("evaluator", line, run)
    evidence, _ = steps.evaluate(evaluator, office.file("after", after), report)
    publisher = office.pod("publisher", line, run)
    steps.gate_publish(publisher, office.file("evidence", evidence), form["policy_uri"], report, summary)


def die(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("settles", ["publisher", "settler", "sweeper"])
def test_each_role_does_its_work_by_the_verbs_that_people_and_pods_call(settles, office, images, stores, monkeypatch):
    """From the import to the purge.

    The publisher settles its own run. The exit handler does it with a settler's rights if the run broke off, and the
    compact sweep does all in one step.
    """
    line, request, run = f"people-{settles}", f"r-{settles}", f"run-{settles}"
    named = sorted(read_split(images / "model").train)[0]
    source = (str(images / "model" / "model.safetensors"), "--data", str(images / "data"), "--arch", "resnet8")
    office.salun("publisher", "model", "import", *source, "--out", str(office.folder / "imported"), "--line", line)
    first = lookup.require_head(stores["auditor"], line).version

    shown = office.salun("submitter", "request", "submit", "--id", request, "--line", line, "--samples", named)
    assert "this account may not read the model, so the sweep checks it" in " ".join(shown.split())
    office.salun("submitter", "request", "submit", "--id", f"{request}-2", "--line", line, "--class-name", "c0")
    office.salun("submitter", "request", "hold", request, "--reason", "identity in doubt")
    office.salun("submitter", "request", "release", request, "--reason", "identity confirmed")
    office.salun("submitter", "request", "cancel", f"{request}-2", "--reason", "withdrawn")
    assert "queued" in office.salun("submitter", "request", "show", request)

    form = {"store_uri": office.uri, "model_line": line, "policy_uri": str(images / "policy.json"), "min_requests": 1}
    form |= {"method": "salun", "method_config": QUICK}
    report = str(office.folder / "report.html")
    if settles == "sweeper":
        assert steps.sweep_compact(office.pod("sweeper", line, run), form, report, f"{report}.md")[0] == 0
    elif settles == "publisher":
        sweep_in_pods(office, line, run, form, report)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(steps, "settle_requests", die)
            with pytest.raises(KeyboardInterrupt):
                sweep_in_pods(office, line, run, form, report)
    ends.settle(office.pod("settler", line, run), "FAILED" if settles == "settler" else "SUCCEEDED", "")
    ends.conclude(office.pod("evaluator", line, run))
    outcome = read_outcome(stores["submitter"], run)
    assert (outcome.state, outcome.completed) == (RunState.PUBLISHED, 1)
    assert read_outcome(stores["submitter"], "run-that-waits") is None
    assert "completed: unlearned" in office.salun("submitter", "request", "show", request)
    assert "completed: unlearned" in office.salun("submitter", "request", "list", "--line", line)

    assert f'salun_runs_since_training{{model_line="{line}"}} 1' in office.salun("exporter", "exporter", "--once")
    second = lookup.require_head(stores["auditor"], line).version
    assert second[:12] in office.salun("operator", "model", "history", line)
    certificate = str(office.folder / "certificate.json")
    office.salun("auditor", "certificate", request, "--out", certificate)
    assert "VALID" in office.salun("auditor", "verify", certificate)

    office.salun("operator", "model", "hold", f"{line}@{first[:12]}", "--reason", "an audit")
    office.salun("operator", "model", "release", f"{line}@{first[:12]}")
    office.salun("operator", "model", "rollback", f"{line}@{first[:12]}", "--reason", "wrong images", "--reopen")
    assert "undone" in office.salun("operator", "model", "history", line)
    for key in KEYS.values():  # what the matrix left is no document
        stores["admin"].delete(key)
    undone = lookup.read_version(stores["auditor"], line, second)
    assert lookup.missing_files(stores["operator"], undone) == []
    office.salun("purger", "purge", "--scratch-hours", "0", "--weights-days", "0", "--every-hours", "0")
    assert "model.safetensors" in lookup.missing_files(stores["operator"], undone)


@pytest.mark.parametrize(
    ("role", "key"),
    [
        *((role, names.scratch_key("run-4", "large")) for role in ("fetcher", "worker", "evaluator", "sweeper")),
        *((role, names.blob_key(B)) for role in ("publisher", "sweeper")),
    ],
)
def test_a_role_sends_a_large_file_in_parts(role, key, stores, tmp_path):
    (tmp_path / "large").write_bytes(bytes(33 * 2**20))
    stores[role].upload(tmp_path / "large", key)


def test_a_submitter_files_what_only_the_sweep_can_check(stores):
    """Card and split are stored as the weights are; HEAD shows whether the line exists."""
    begin_classifier(stores["publisher"], "signs")
    targets = {"s-1": ClassTarget(class_name="cat"), "s-2": ClassTarget(class_name="unicorn")}
    items = [Submission(id=name, model_line="signs", target=target) for name, target in targets.items()]
    for check_data in (None, False):
        filed, matches = file_requests(stores["submitter"], items, "ana", check_data=check_data)
        assert [receipt.id for receipt in filed.receipts] == ["s-1", "s-2"]
        assert {match.unchecked for match in matches} == {"this account may not read the model, so the sweep checks it"}
    with pytest.raises(StoreError, match="not allowed"):
        file_requests(stores["submitter"], items, "ana", check_data=True)
    with pytest.raises(UsageError, match="did you mean 'signs'"):
        file_requests(stores["submitter"], [items[0].model_copy(update={"model_line": "sings"})], "ana")
    assert file_requests(stores["operator"], items[:1], "ana", dry_run=True)[1][0].class_name == "cat"


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
