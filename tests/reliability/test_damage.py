"""A bit flipped in, an end cut off, two objects swapped: what a line's readers refuse, and what they cannot notice.

Manifests and files carry their digest in their key: every damage is refused before anything is parsed. HEAD, requests,
events, runs and leases carry none. A damage of theirs that is still well-formed, such as another digit in a time, can
pass; BLIND says exactly in which fields, and the test fails when a field is added to them or leaves them.

SALUN_RELIABILITY=full damages ten times as many objects.
"""

import contextlib
import os
import random
import secrets
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

import pytest

from salun_core.data.forget_set import ForgetSet
from salun_core.data.split import SPLIT, SplitManifest
from salun_core.data.targets import ClassTarget, SamplesTarget, SubjectTarget
from salun_core.digest import canonical_json
from salun_core.errors import IntegrityError, SalunError
from salun_core.models.architectures import build_classifier
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import CARD, WEIGHTS, load_model, save_model
from salun_core.registry import lookup
from salun_core.registry.lookup import read_version
from salun_core.registry.manifest import Head
from salun_core.registry.versions import fetch_version, publish_head, stage_version
from salun_core.requests.ledger import Ledger
from salun_core.requests.reading import read_events, read_request
from salun_core.requests.schema import DeletionRequest, Receipt, RequestEvent
from salun_core.saliency import SaliencyMask
from salun_core.storage import keys as names
from salun_core.storage import open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.leases import Lease, acquire, read_lease
from salun_core.storage.objects import Entry, StoredObject
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.runs import RunEvent, RunLog, RunRecord, RunStatus
from tests.support.fault_proxy import FaultProxy
from tests.support.toy_line import run_record

pytestmark = pytest.mark.s3
DAMAGES = 1000 if os.environ.get("SALUN_RELIABILITY") == "full" else 100  # of each of two kinds
LINE, RUN, A, B = "faces", "run-1", "a" * 64, "b" * 64
NOW = datetime(2026, 1, 31, tzinfo=UTC)
MASK = "mask.safetensors"
BLIND = {
    Head: {"published_at", "run", "sequence"},
    DeletionRequest: {"due_at", "model_line", "received_at", "source", "target"},
    RequestEvent: {"actor", "at", "attempt", "reason", "rung", "writer"},
    RunRecord: set(RunRecord.model_fields)
    - {"format", "run", "method_config", "group"}
    - {"policy_digest", "tried"},  # null in this record, and no flip makes a value of null
    RunEvent: {"actor", "at", "epoch", "reason", "writer"},
    Lease: {"beat", "epoch", "holder", "seconds"},
}


@dataclass(frozen=True)
class Object:
    """A stored object, what its readers make of it, and whether its key says its digest."""

    key: str
    kind: type | str
    read: object
    digested: bool = False


class Shelf:
    """The reading half of a store, in memory: for the hundred thousand flips of the exhaustive test."""

    def __init__(self, objects):
        self.objects = dict(objects)

    def get(self, key):
        data = self.objects.get(key)
        return None if data is None else StoredObject(data, "etag", NOW, NOW)

    def list(self, prefix):
        return (Entry(key, 0, NOW, "etag") for key in sorted(self.objects) if key.startswith(prefix))


def split_of(count):
    rows = {f"sample-{number}": f"{number:064x}" for number in range(count)}
    return SplitManifest(dataset_digest=A, train=rows, validation={}, test={"held-out": B})


def model_files(folder):
    """The files of a tiny model, with a mask of it."""
    split = split_of(20)
    facts = {"classes": ["a", "b"], "channels": 1, "height": 8, "width": 8, "mean": [0.5], "std": [0.5]}
    card = ModelCard(
        architecture="resnet8", data={"source": "digits"}, dataset_digest=A, split_digest=split.digest, **facts
    )
    network = build_classifier("resnet8", 2, 1)
    save_model(folder, network, card, split)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    SaliencyMask.random(shapes, 0.5, 0).save(folder / MASK)
    return {name: folder / name for name in (WEIGHTS, CARD, SPLIT, MASK)}


def record(run):
    return run_record(run, A, NOW.isoformat(), line=LINE)


def fill(store, folder):
    """Write two versions, their HEAD, requests with events, runs, leases and a sealed forget set."""
    files = model_files(folder)
    first, _ = stage_version(store, {"line": LINE, "method": "train"}, files)
    publish_head(store, LINE, first, None, None)
    second, _ = stage_version(store, {"line": LINE, "method": "salun", "parent": first, "run": RUN}, files)
    publish_head(store, LINE, second, first, RUN)
    ledger = Ledger(store, lambda: NOW)
    targets = [
        SamplesTarget(ids=["sample-1", "sample-2"]),
        ClassTarget(class_id=1),
        SubjectTarget(subject_ref="person-07"),
    ]
    for number, target in enumerate(targets):
        ledger.submit(f"r-{number}", LINE, target, source="form")
        ledger.hold(f"r-{number}", "clerk", "looks at it")
        ledger.release(f"r-{number}", "clerk", "fine")
    runs = RunLog(store, lambda: NOW)
    for run in (RUN, "run-2"):
        runs.start(record(run), "sweep")
        runs.advance(run, RunStatus.MASKING, "compute_mask", "goes on")
    for line in (LINE, "voices"):
        acquire(store, line, RUN, 60)
    forget = ForgetSet(dataset_digest=A, split_digest=B, ids=["sample-1", "sample-2"], kinds=["samples"])
    store.put_new(names.scratch_key(RUN, "forget.json"), canonical_json(forget.model_dump(mode="json")))


def objects_of(store, folder):
    """Each object under its key, with its reader."""
    found = [Object(names.head_key(LINE), Head, lambda store: read_line(store))]
    for version in lookup.ancestry(store, LINE):
        key = names.version_key(LINE, version.digest)
        found.append(
            Object(key, "manifest", lambda store, digest=version.digest: read_version(store, LINE, digest), True)
        )
    for name, entry in version.manifest.files.items():
        read = partial(read_file, entry=entry, path=folder / "fetched")
        found.append(Object(names.blob_key(entry.sha256), name, read, True))
    for request in ("r-0", "r-1", "r-2"):
        read = partial(read_request, request_id=request)
        found.append(Object(names.request_key(request), DeletionRequest, read))
        read = partial(read_events, request_id=request)
        found += [Object(names.event_key(request, number), RequestEvent, read) for number in (1, 2, 3)]
    for run in (RUN, "run-2"):
        found.append(Object(names.run_key(run, "run.json"), RunRecord, lambda store, run=run: log(store).read(run)))
        found.append(Object(names.run_event_key(run, 2), RunEvent, lambda store, run=run: log(store).last(run)))
    found += [Object(names.lease_key(line), Lease, partial(read_lease, line=line)) for line in (LINE, "voices")]
    return found


def log(store):
    return RunLog(store, lambda: NOW)


def read_line(store):
    """HEAD with the manifest that it points to, as every reader of a line goes."""
    head = lookup.read_head(store, LINE)[0]
    read_version(store, LINE, head.version)
    return head


def read_file(store, entry, path):
    path.unlink(missing_ok=True)
    fetch_blob(store, entry.sha256, path, entry.size)
    return path.read_bytes()


def overwrite(store, key, data):
    """Change an object as an intruder with a key would; what the disk does wrong, the store's own checksums find."""
    client, bucket, prefix = store.native
    client.put_object(Bucket=bucket, Key=prefix + key, Body=data)


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def changed_fields(before, after):
    """Which fields of a document (or of the events of a request) differ."""
    if isinstance(before, list):
        return {name for one, other in zip(before, after, strict=True) for name in changed_fields(one, other)}
    return {name for name in type(before).model_fields if getattr(before, name) != getattr(after, name)}


@pytest.fixture(scope="module")
def line(s3_server, tmp_path_factory):
    """A store with a small line in it, and its objects."""
    folder = tmp_path_factory.mktemp("damage")
    store = open_store(f"s3://salun/{secrets.token_hex(8)}")
    fill(store, folder / "model")
    return store, objects_of(store, folder)


@pytest.fixture(scope="module")
def whole(line):
    """The bytes of each object, and what its reader makes of them."""
    store, objects = line
    return {item.key: (store.get(item.key).data, item.read(store)) for item in objects}


def refusal(item, store):
    """Return the error that a reader raises, or the document that it takes."""
    try:
        return None, item.read(store)
    except SalunError as error:
        return error, None


def test_what_an_intruder_leaves_is_refused(line, whole):
    store, objects = line
    rng, seen = random.Random(7), Counter()
    for number in range(DAMAGES):
        item, how = rng.choice(objects), ("flip", "truncate", "swap")[number % 3]
        data, undamaged = whole[item.key]
        other = rng.choice([other for other in objects if whole[other.key][0] != data])
        bad = {
            "flip": flipped(data, rng.randrange(8 * len(data))),
            "truncate": data[: rng.randrange(len(data))],
            "swap": whole[other.key][0],
        }[how]
        overwrite(store, item.key, bad)
        error, found = refusal(item, store)
        overwrite(store, item.key, data)
        seen[how, "refused" if error else "passed"] += 1
        if item.digested:
            assert isinstance(error, IntegrityError), (item.key, how)
            assert "does not match its digest" in str(error) or "another size" in str(error)  # before it is parsed
        elif not error:
            assert how == "flip", (item.key, how)
            assert changed_fields(undamaged, found) <= BLIND[item.kind], item.key
    print(dict(seen))
    assert seen["flip", "refused"] > 5 * seen["flip", "passed"]
    assert {item.key: item.read(store) for item in objects} == {key: found for key, (_, found) in whole.items()}


class Flipping(FaultProxy):
    """Flips one bit in the body of each object that is read, as a bad cable or a bad disk would."""

    def __init__(self, upstream, rng):
        super().__init__(upstream, lambda line: None)
        self._rng = rng

    def _replies(self, client, server, line):
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                head, mark, body = data.partition(b"\r\n\r\n") if data.startswith(b"HTTP/1.1") else (b"", b"", data)
                if body and line[0].startswith("GET ") and "list-type" not in line[0]:
                    body, self.faults = flipped(body, self._rng.randrange(8 * len(body))), self.faults + 1
                client.sendall(head + mark + body)
        self._close(client, server)


def test_bits_flipped_below_us_are_refused_before_anything_is_parsed(line, whole):
    """The store keeps the SHA-256 that the writer computed, and the client compares: this holds for each document."""
    store, objects = line
    client, bucket, prefix = store.native
    address = urlsplit(client.meta.endpoint_url)
    rng = random.Random(3)
    with Flipping((address.hostname, address.port), rng) as proxy:
        damaged = S3Store(bucket, prefix, endpoint=proxy.endpoint)
        for item in (rng.choice(objects) for _ in range(DAMAGES)):
            error, _ = refusal(item, damaged)
            assert isinstance(error, IntegrityError), item.key
            assert "do not match" in str(error) or "does not match its digest" in str(error), error
    assert proxy.faults >= DAMAGES


@pytest.mark.parametrize("kind", BLIND, ids=lambda kind: kind.__name__)
def test_every_single_bit_of_a_document_without_a_digest(kind, line):
    """Each bit of one document: refused, or it changes a field that BLIND names; and all of those can change."""
    store, objects = line
    shelf = Shelf(
        (entry.key, store.get(entry.key).data) for entry in store.list("") if not entry.key.startswith("blobs/")
    )
    blind, flips, passed = set(), 0, 0
    for item in [item for item in objects if item.kind is kind][-1:]:
        data, undamaged = shelf.objects[item.key], item.read(shelf)
        for bit in range(8 * len(data)):
            flips += 1
            shelf.objects[item.key] = flipped(data, bit)
            try:
                found = item.read(shelf)
            except SalunError:
                continue
            passed += 1
            blind |= changed_fields(undamaged, found)
            if kind is DeletionRequest:  # whoever filed it holds a receipt, and that notices
                assert Receipt.of(found).sha256 != Receipt.of(undamaged).sha256
        shelf.objects[item.key] = data
    print(f"{kind.__name__}: {passed} of {flips} flips pass unnoticed, in {sorted(blind)}")
    assert blind == BLIND[kind]


def test_a_whole_model_is_fetched_only_when_each_file_is_right(line, tmp_path):
    store, objects = line
    version = lookup.resolve(store, LINE)[1]
    fetch_version(store, LINE, version, tmp_path / "model")
    load_model(tmp_path / "model")
    for item in [item for item in objects if item.kind in (WEIGHTS, CARD, SPLIT, MASK)]:
        data = store.get(item.key).data
        overwrite(store, item.key, flipped(data, 8 * (len(data) // 2)))
        with pytest.raises(IntegrityError):
            fetch_version(store, LINE, version, tmp_path / "damaged")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        overwrite(store, item.key, data)
