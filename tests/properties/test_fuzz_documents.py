"""Whatever the bytes, a reader gives a whole document or a `SalunError`, and no file appears outside its folder.

Masks have their own: test_mask_file_fuzz.py. SALUN_RELIABILITY=full runs ten times as many cases.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as serialise

from salun_core.config import MAX_DEPTH, load, parse_text
from salun_core.data.split import SplitManifest
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.gate import GateDecision, Policy
from salun_core.models.architectures import build_classifier
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import load_model, read_weights, save_model
from salun_core.models.importing import read_checkpoint
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.registry.versions import fetch_version
from salun_core.requests.intake import read_submissions
from salun_core.requests.schema import DeletionRequest, RequestEvent
from salun_core.storage import keys as names
from salun_core.storage.documents import parse_stored
from salun_core.storage.leases import Lease
from salun_core.sweeps.runs import RunEvent, RunRecord
from salun_core.tasks.resolve import read_forget

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, before it refuses
ROOT = Path(__file__).parents[2]
SCALE = 10 if os.environ.get("SALUN_RELIABILITY") == "full" else 1
A, B = "a" * 64, "b" * 64
NOW, LATER = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
SPLIT = {"format": "salun.split/v1", "dataset_digest": A, "train": {"x": A, "y": B}, "validation": {}, "test": {"z": B}}
FORGET = {"format": "salun.forget-set/v1", "dataset_digest": A, "split_digest": B, "ids": ["x"], "kinds": ["samples"]}
CARD = {
    "architecture": "resnet8",
    "classes": ["a", "b"],
    "channels": 1,
    "height": 8,
    "width": 8,
    "mean": [0.5],
    "std": [0.5],
    "data": {"source": "digits"},
    "dataset_digest": A,
    "split_digest": B,
    "training": {"epochs": 3, "nested": {"deep": [1, {"er": None}]}},
}
SUBMISSION = {"id": "r-1", "model_line": "faces", "target": {"kind": "samples", "ids": ["x", "y"]}, "received_at": NOW}
RUN = {
    "run": "run-1",
    "line": "faces",
    "parent": A,
    "epoch": 1,
    "created_at": NOW,
    "method": "salun",
    "density": 0.5,
    "method_config": {"epochs": 5, "more": {"a": [1, 2]}},
    "levels": [{"role": "strength"}, {"role": "retrain"}],
    "max_attempts": 10,
    "work_key": B,
    "members": [{"id": "r-1", "event": 1, "attempt": 1, "forget_digest": A, "salt": "0" * 32, "found": 3, "named": 3}],
    "forget_sha256": "f" * 64,
    "forget_count": 3,
    "train_count": 100,
}
STEP = {"at": NOW, "actor": "sweep", "reason": "claimed", "writer": "0" * 32}
STORED = {
    DeletionRequest: {**SUBMISSION, "due_at": LATER, "source": "form"},
    RequestEvent: {**STEP, "request": "r-1", "n": 1, "from_status": "received", "to_status": "queued", "attempt": 1},
    RunRecord: RUN,
    RunEvent: {**STEP, "run": "run-1", "n": 1, "from_status": None, "to_status": "claimed", "epoch": 1},
    Lease: {"line": "faces", "holder": "run-1", "epoch": 1, "beat": 1, "seconds": 60},
    Head: {"line": "faces", "version": A, "sequence": 1, "published_at": NOW, "run": "run-1"},
    VersionManifest: {
        "line": "faces",
        "created_at": NOW,
        "files": {"model.json": {"sha256": A, "size": 3}},
        "method": "salun",
    },
}
RULE = {"metric": "UA", "op": ">=", "value": 0.5, "reason": "r"}
REFUSAL = {"words": "w", "figures": "f", "cause": "damaged", "next": "n"}
VERDICT = {"rule": "r", "threshold": "0.5", "passed": True, "reason": "r"}
FILES = {
    SplitManifest: SPLIT,
    ModelCard: CARD,
    Policy: {"format": "salun.policy/v1", "name": "p", "rules": [RULE, {**RULE, "op": "within", "tolerance": 0.1}]},
    GateDecision: {
        "passed": False,
        "policy": "p",
        "policy_digest": A,
        "evidence_digest": B,
        "summary": "s",
        "verdicts": [VERDICT, {**VERDICT, "passed": False, "refusal": REFUSAL}],
    },
}
TARGETS = [
    FORGET,
    {"kind": "samples", "ids": ["x"]},
    [{"kind": "class", "class_id": 1}, {"kind": "subject", "subject_ref": "s"}],
    {"kind": "concept", "prompts": ["p"], "anchor_prompt": "q"},
]


def nested(depth):
    document = {}
    for _ in range(depth):
        document = {"a": document}
    return document


HOSTILE = [
    *(None, True, -1, 0, 2**53, 2**64, 2**70, -(2**63) - 1, 1.5, float("nan"), float("inf"), 1e308),
    *("", " ", "x" * 5000, "\x00", "\n", "\ud800", "\u202e", "../../etc/passwd", "/etc/passwd", "..", "a\\b", "%2e%2e"),
    *("salun.head/v9", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", "-1", "1e400", "s3://x/../y"),
    *([], {}, [[]], [None], {"": ""}, {"kind": "samples"}, {"kind": ["samples"]}, ["x"] * 300),
    *(nested(MAX_DEPTH), nested(900), [[[[["a"]]]]]),
]


def places(document, path=()):
    """Every place of a document that something else could stand in."""
    yield path
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in inside:
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def mutated(rng, document):
    """Return JSON text of a document with one hostile change."""
    changed = copy.deepcopy(document)
    *way, last = (None, *rng.choice(list(places(document))))
    holder = changed
    for key in way[1:]:
        holder = holder[key]
    kind = rng.random()
    if last is None:
        changed = rng.choice(HOSTILE)
    elif kind < 0.7:
        holder[last] = rng.choice(HOSTILE)
    elif kind < 0.8:
        del holder[last]
    elif kind < 0.9 and isinstance(holder, dict):
        holder[str(rng.choice(HOSTILE))] = holder[last]
    else:
        text = json.dumps(changed)
        return text[:-1] + "," + text[1:] if len(text) > 2 else text  # every key twice
    return json.dumps(changed)


def damaged(rng, data):
    """Return bytes with one bit, byte, stretch or end changed."""
    place, kind = rng.randrange(len(data)), rng.random()
    if kind < 0.4:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind < 0.6:
        return data[:place] + rng.choice([b"\xff", b"\x00", b'"', b"{", b"]", b"9" * 6000, b"\\u"]) + data[place + 1 :]
    if kind < 0.8:
        return data[:place]
    return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]


def whole(document):
    """What a reader returned can be written and digested again."""
    for item in document if isinstance(document, list) else [document]:
        plain = item.model_dump(mode="json")
        json.dumps(plain)
        try:
            canonical_json(plain)
        except IntegrityError:  # an integer beyond JSON's, or half of a surrogate pair: refused before it is written
            continue


def survives(read, data):
    """Return whether a reader took the data; anything but a whole document or a `SalunError` escapes."""
    try:
        whole(read(data))
    except SalunError:
        return False
    return True


def stored(kind):
    """Reader of a document that came out of the store."""
    return lambda data, path: parse_stored(kind, data, "key")


def filed(read):
    """Reader of a document that lies in a file."""

    def written(data, path):
        path.write_bytes(data)
        return read(path)

    return written


def submissions(data, path):
    """Reader of what `salun request submit` is given."""
    return list(read_submissions(data.decode(errors="surrogateescape"), "stdin"))


READERS = {
    **{kind.__name__: (stored(kind), [document]) for kind, document in STORED.items()},
    **{kind.__name__: (filed(partial(load, kind)), [document]) for kind, document in FILES.items()},
    "forget": (filed(lambda path: read_forget(str(path))), TARGETS),
    "submissions": (submissions, [SUBMISSION, [SUBMISSION, {**SUBMISSION, "id": "r-2"}]]),
}


@pytest.mark.parametrize("name", READERS)
def test_a_document_is_valid_or_refused(name, tmp_path):
    read, documents = READERS[name]
    rng, path, taken, refused = random.Random(name), tmp_path / "document", 0, 0
    assert all(survives(partial(read, path=path), json.dumps(document).encode()) for document in documents)
    for _ in range(60 * SCALE):
        document = rng.choice(documents)
        text = mutated(rng, document) if rng.random() < 0.6 else None
        data = text.encode() if text is not None else damaged(rng, json.dumps(document).encode())
        if survives(partial(read, path=path), data):
            taken += 1
        else:
            refused += 1
    assert refused > taken  # what is taken: another text in a free field, an id, a digit of a time
    assert [found.name for found in tmp_path.iterdir() if found != path] == []


AMBIGUOUS = ['{"a": 1, "a": 2}', "a: 1\na: 2", "rules: []\n? rules\n: [x]"]
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in pairwise("abcdefghijklmnopqrst")
)
HARD = {
    "a million brackets": "[" * 1_000_000,
    "a million braces": '{"a":' * 1_000_000,
    "a long number": '{"n": ' + "9" * 100_000 + "}",
    "a long number in YAML": "n: " + "9" * 100_000,
    "a long hexadecimal number in YAML": "n: 0x" + "f" * 2_000_000,  # it can be read, and never be printed
    "a long number to base 60 in YAML": "n: 1" + ":59" * 300_000,  # it took minutes
    "a long decimal in YAML": "n: 1." + "9" * 2_000_000,
    "15 MB of YAML": "- sample\n" * 1_700_000,  # they took 47 s
    "a million dashes": "- " * 1_000_000,  # nested; the loader recurses in C
    "a billion laughs": LAUGHS,
    "a list that holds itself": "&a [*a]",
    "an object of Python": "!!python/object/apply:os.system [touch escaped]",
    "an empty integer": "!!int ''",
    "an empty float": "!!float ''",
    "no boolean": "!!bool maybe",
    "no date": "!!timestamp today",
    "a thirteenth month": "2026-13-01",
    "a key that is a list": "{[1]: 2}",
    "half a pair": '"\\ud800',
    "a zero byte": "\x00",
    **{f"a key twice ({number})": text for number, text in enumerate(AMBIGUOUS)},
}


@pytest.mark.parametrize("name", HARD)
def test_hard_text_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        parse_text(HARD[name], "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [ModelCard, RunRecord])
def test_free_fields_have_a_depth_limit(kind, tmp_path):
    document, field = (CARD, "training") if kind is ModelCard else (RUN, "method_config")
    read = READERS[kind.__name__][0]
    whole(read(json.dumps({**document, field: nested(MAX_DEPTH - 2)}).encode(), tmp_path / "document"))
    for depth in (MAX_DEPTH, 300, 900):
        with pytest.raises(SalunError, match="nested too deep|not valid JSON"):
            read(json.dumps({**document, field: nested(depth)}).encode(), tmp_path / "document")


def test_yaml_of_megabytes_is_refused_before_it_is_parsed():
    """15 MB of it take a parser 47 seconds; JSON of that size is read."""
    text = "ids: [" + "a, " * 5_000_000 + "a]"
    with pytest.raises(UsageError, match="too large for YAML"):
        parse_text(text, "forget.yaml")
    assert len(parse_text(json.dumps({"ids": ["a"] * 3_000_000}), "forget.json")["ids"]) == 3_000_000


def test_a_document_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(65 * 1024 * 1024)  # a hole: it takes no room on the disk
    with pytest.raises(UsageError, match="too large"):
        load(Policy, path)


@pytest.mark.parametrize("where", ["/etc/passwd", "nowhere", "../x", "file:///etc/passwd", "http://127.0.0.1/x"])
def test_a_target_does_not_read_local_files(where, tmp_path):
    path = tmp_path / "forget.json"
    path.write_text(json.dumps({"kind": "samples", "manifest_uri": where, "sha256": A}))
    with pytest.raises(UsageError, match=r"its address is not s3://") as refused:
        read_forget(str(path))
    assert "passwd" not in str(refused.value)


TRAVERSALS = [
    "../x",
    "../../x",
    "/tmp/x",
    "..",
    ".",
    "",
    "a//b",
    "a/b/c/d/e",
    "unet/.hidden",
    "a/../../x",
    ".hidden",
    "a\\b",
    "a\x00",
    "a\n",
    "x" * 129,
]


@pytest.mark.s3
def test_no_file_of_a_version_leaves_its_folder(store, tmp_path):
    """No archive is ever unpacked; the names in manifests are the only ones that become paths."""
    blob = {"sha256": sha256_bytes(b"x"), "size": 1}
    store.put_new(names.blob_key(blob["sha256"]), b"x")
    for name in ["model.json", *TRAVERSALS]:
        manifest = VersionManifest.model_construct(**{**STORED[VersionManifest], "files": {name: blob}})
        data = canonical_json(manifest.model_dump(mode="json", warnings=False))
        store.put_new(names.version_key("faces", sha256_bytes(data)), data)
        if name == "model.json":  # the same way to a plain name
            fetch_version(store, "faces", sha256_bytes(data), tmp_path / "fine")
            continue
        with pytest.raises(IntegrityError, match="plain file name"):
            fetch_version(store, "faces", sha256_bytes(data), tmp_path / "root" / "model")
    assert [found.name for found in tmp_path.iterdir()] == ["fine"]


def test_nothing_unpacks_archives():
    """If this fails, unpack with tarfile's data filter, and put its traversals to the test here.

    WebDataset archives are read in place: their members are never written to a folder.
    """
    sources = [path for folder in ("salun_core", "components", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    unpacking = ("unpack_archive", "extractall", ".extract(")  # zipfile reads a directory, too
    assert [path.name for path in sources if any(word in path.read_text() for word in unpacking)] == []
    assert [path.name for path in sources if "tarfile" in path.read_text()] == ["archives.py"]


STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2), "n": torch.tensor(3)}
WEIGHTS = serialise(STATE)


def header(text, body=b"\0" * 24, size=None):
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


def invented(rng):
    """Return a safetensors file with an invented header."""
    hostile = [*HOSTILE, [0, 2**62], [2**40, 2**40], [-1, 24], [24, 0], [0, 2**64 - 1], "F64", "F4", "XX"]
    tensor = entry(**{rng.choice(["dtype", "shape", "data_offsets"]): rng.choice(hostile)})
    text = json.dumps(
        {rng.choice(["w", "", "../x", "__metadata__"]): rng.choice([tensor, rng.choice(hostile)])}
    ).encode()
    return header(text, size=rng.choice([None, None, 0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1]))


def test_headers_of_weights_are_refused_before_anything_is_allocated(tmp_path):
    rng, path = random.Random(1), tmp_path / "model.safetensors"
    for _ in range(150 * SCALE):
        path.write_bytes(invented(rng) if rng.random() < 0.6 else damaged(rng, WEIGHTS))
        try:
            state = read_weights(path)
        except IntegrityError:
            continue
        assert sum(tensor.nbytes for tensor in state.values()) <= path.stat().st_size
    path.write_bytes(header(json.dumps({"w": entry(shape=[2**40], data_offsets=[0, 2**42])}).encode()))
    with pytest.raises(IntegrityError):
        read_weights(path)
    assert [found.name for found in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    split = SplitManifest.model_validate(SPLIT)
    card = ModelCard.model_validate({**CARD, "split_digest": split.digest})
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    save_model(folder, build_classifier("resnet8", 2, 1), card, split)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 10**9},
        {"channels": 2**70},
        {"channels": 3},
        {"height": 10**9},
        {"classes": ["a", "b", "c"]},
        {"classes": [str(number) for number in range(100_001)]},
        {"architecture": "timm:hf-hub:someone/something"},
        {"architecture": "timm:local-dir:/etc"},
        {"split_digest": B},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_card_cannot_demand_more_memory_than_its_weights(changes, model, tmp_path):
    """Its numbers build a network before the weights are looked at, so they are bounded themselves."""
    copied = tmp_path / "model"
    shutil.copytree(model, copied)
    card = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps({**card, **changes}))
    with pytest.raises(SalunError):
        load_model(copied)


class Trap:
    def __reduce__(self):
        return os.system, ("touch escaped",)


def torch_bytes(value, zipped=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


PICKLES = [
    pickle.dumps(Trap()),
    pickle.dumps([Trap()], protocol=0),
    torch_bytes({"w": Trap()}),
    torch_bytes(Trap(), False),
]


@pytest.mark.parametrize("number", range(len(PICKLES)))
def test_no_reader_runs_a_pickle(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read, _ in READERS.values():
        assert not survives(partial(read, path=tmp_path / "document"), PICKLES[number])
    for suffix in (".safetensors", ".pt", ".pth"):
        path = tmp_path / f"document{suffix}"
        path.write_bytes(PICKLES[number])
        with pytest.raises(SalunError):
            read_checkpoint(path)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoints_give_tensors_or_a_salun_error(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, path, data = random.Random(2), tmp_path / "state.pt", torch_bytes(STATE, zipped)
    for _ in range(50 * SCALE):
        path.write_bytes(damaged(rng, data))
        with contextlib.suppress(SalunError):
            assert all(isinstance(value, torch.Tensor) for value in read_checkpoint(path).state.values())
    assert [found.name for found in tmp_path.iterdir()] == ["state.pt"]


BUILDERS = {
    names.head_key: "lines/",
    names.lease_key: "leases/",
    names.request_key: "requests/",
    names.certificate_key: "certificates/",
    names.scratch_prefix: "scratch/",
    names.run_events_prefix: "runs/",
    names.index_prefix: "index/",
    partial(names.addendum_key, "r-1"): "addenda/r-1/",
    partial(names.run_key, "run-1"): "runs/run-1/",
    partial(names.index_key, "queued", "faces", 1, 1): "index/queued/faces/",
    lambda text: names.version_hold_key(text, A): "holds/",
    names.blob_key: "blobs/sha256/",
}


@settings(max_examples=100 * SCALE)
@given(
    text=st.text(max_size=70) | st.from_regex(r"[./a-z0-9_-]{0,70}", fullmatch=True),
    number=st.integers(0, len(BUILDERS) - 1),
)
def test_a_key_stays_below_its_folder(text, number):
    build, folder = list(BUILDERS.items())[number]
    try:
        key = build(text)
    except SalunError:
        return
    assert key.startswith(folder)
    assert text in key
    assert not {"", ".", ".."} & set(key.rstrip("/").split("/"))
