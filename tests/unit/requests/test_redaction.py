import hashlib
import hmac
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from salun_core.config import parse
from salun_core.data.targets import ClassTarget, ConceptTarget, SamplesTarget, SubjectTarget
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import DeletionRequest, Outcome, Status, Submission, summarise
from tests.support.decisions import PROCEDURE
from tests.support.memory_store import MemoryStore

KEY = "requests/r-1/request.json"
TARGETS = {
    "samples": SamplesTarget(ids=["secret-2", "secret-1"], dataset_digest="a" * 64),
    "manifest": SamplesTarget(manifest_uri="s3://secret/ids.json", sha256="0" * 64),
    "subject": SubjectTarget(subject_ref="secret-person"),
    "class": ClassTarget(class_id=3),
    "concept": ConceptTarget(prompts=["secret cat", "secret dog"], anchor_prompt="a secret"),
}


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param]


def document(store):
    return json.loads(store.objects[KEY][0])


@pytest.mark.parametrize("keep", [True, False])
def test_the_target_is_removed_and_the_receipt_stays(store, clock, target, keep):
    ledger = Ledger(store, clock)
    receipt = ledger.submit("r-1", "faces", target, source="ticket 7")
    before = document(store)
    assert redact_request(store, "r-1", keep) is True
    assert b"secret" not in store.objects[KEY][0]
    after = document(store)
    assert after["sha256"] == receipt.sha256
    assert {name: after[name] for name in before if name != "target"} == {
        name: before[name] for name in before if name != "target"
    }
    clock.tick(days=3)
    assert ledger.submit("r-1", "faces", target, source="ticket 7") == receipt
    assert ledger.submit("r-1", "faces", target, ledger.get("r-1").received, "ticket 7") == receipt
    for other in ({"target": ClassTarget(class_id=4)}, {"source": "ticket 8"}, {"model_line": "cats"}):
        with pytest.raises(ConflictError, match="exists already"):
            ledger.submit(
                **{"request_id": "r-1", "model_line": "faces", "target": target, "source": "ticket 7", **other}
            )
    assert document(store) == after


def test_repeating_changes_nothing_and_hashes_can_only_be_removed(store, clock, target):
    Ledger(store, clock).submit("r-1", "faces", target)
    redact_request(store, "r-1", keep_hashes=True)
    kept = document(store)
    assert redact_request(store, "r-1", keep_hashes=True) is False
    assert document(store) == kept
    assert redact_request(store, "r-1", keep_hashes=False) is ("salt" in kept["target"])
    bare = document(store)
    assert "salt" not in bare["target"]
    assert bare["target"]["hashes"] == []
    assert redact_request(store, "r-1", keep_hashes=True) is False
    assert document(store) == bare


def test_hashes_are_salted_and_sorted(store, clock):
    Ledger(store, clock).submit("r-1", "faces", TARGETS["samples"])
    redact_request(store, "r-1", keep_hashes=True)
    left = document(store)["target"]
    assert (left["of"], left["count"], left["dataset_digest"]) == ("samples", 2, "a" * 64)
    key = bytes.fromhex(left["salt"])
    expected = [hmac.new(key, b"samples\0" + name, hashlib.sha256).hexdigest() for name in (b"secret-1", b"secret-2")]
    assert left["hashes"] == sorted(expected)


def test_the_ids_of_a_manifest_are_hashed(store, clock):
    Ledger(store, clock).submit("r-1", "faces", TARGETS["manifest"])
    redact_request(store, "r-1", keep_hashes=True, ids=["secret-1", "secret-1", "secret-2"])
    left = document(store)["target"]
    assert (left["count"], len(left["hashes"])) == (0, 2)


def test_two_requests_of_one_person_have_different_hashes(store, clock):
    ledger = Ledger(store, clock)
    for name in ("r-1", "r-2"):
        ledger.submit(name, "faces", TARGETS["subject"])
        redact_request(store, name, keep_hashes=True)
    first, second = (ledger.get(name).target for name in ("r-1", "r-2"))
    assert first.salt != second.salt
    assert first.hashes != second.hashes


@pytest.mark.parametrize("to", [Status.CANCELLED, Status.REJECTED])
def test_a_request_that_will_not_be_erased_keeps_no_hashes(store, clock, to):
    ledger = Ledger(store, clock)
    ledger.submit("r-1", "faces", TARGETS["samples"])
    if to is Status.REJECTED:
        del store.objects["requests/r-1/events/000001.json"]
    ledger.move("r-1", Transition(to, "ana", "test"))
    assert b"secret" not in store.objects[KEY][0]
    assert "salt" not in document(store)["target"]


def test_a_cancelled_reopened_request_loses_its_hashes(store, clock):
    ledger = Ledger(store, clock)
    ledger.submit("r-1", "faces", TARGETS["samples"])
    ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed"))
    ledger.move(
        "r-1", Transition(Status.COMPLETED, "sweep", "published", outcome=Outcome.UNLEARNED, assurance=PROCEDURE)
    )
    redact_request(store, "r-1", keep_hashes=True)
    ledger.reopen("r-1", "ana", "rolled back")
    assert len(ledger.get("r-1").target.hashes) == 2
    ledger.cancel("r-1", "ana", "withdrawn")
    assert ledger.get("r-1").target.hashes == []


def test_an_unknown_or_damaged_request_is_refused(store, clock):
    Ledger(store, clock).submit("r-1", "faces", TARGETS["class"])
    with pytest.raises(UsageError, match="did you mean 'r-1'"):
        redact_request(store, "r-2", keep_hashes=True)
    data, _, modified = store.objects[KEY]
    store.objects[KEY] = (data.replace(b"r-1", b"r-3"), "other", modified)
    with pytest.raises(IntegrityError, match="copied or moved"):
        redact_request(store, "r-1", keep_hashes=True)


def test_concurrent_redactions_give_one_document(real_store, clock):
    store = real_store
    Ledger(store, clock).submit("r-1", "faces", TARGETS["samples"])
    gate = threading.Barrier(3)

    def redact(_):
        gate.wait()
        return redact_request(store, "r-1", keep_hashes=True)

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(redact, range(3))) == [False, False, True]
    assert len(Ledger(store, clock).get("r-1").target.hashes) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"target": {"kind": "class", "class_id": 3}},
        {"sha256": None},
        {"sha256": "0"},
        {"target": {"kind": "redacted", "of": "class", "count": 1}},
        {"target": {"kind": "redacted", "of": "subject", "count": 1, "class_id": 3}},
        {"target": {"kind": "redacted", "of": "subject", "count": 1, "hashes": ["0" * 64]}},
        {"target": {"kind": "redacted", "of": "subject", "count": 1, "salt": "0" * 31}},
        {"target": {"kind": "redacted", "of": "subject", "count": -1}},
    ],
)
def test_an_invalid_redacted_request_is_refused(changes):
    fields = {
        "id": "r-1",
        "model_line": "faces",
        "target": {"kind": "redacted", "of": "subject", "count": 1},
        "received_at": "2026-01-31T09:00:00+00:00",
        "due_at": "2026-02-28T09:00:00+00:00",
        "sha256": "0" * 64,
    }
    assert parse(DeletionRequest, fields, "request").filed_sha256 == "0" * 64
    with pytest.raises(UsageError):
        parse(DeletionRequest, {**fields, **changes}, "request")


def test_a_redacted_target_cannot_be_filed(store, clock):
    target = {"kind": "redacted", "of": "class", "count": 1, "class_id": 3}
    with pytest.raises(UsageError, match="names nothing: file"):
        parse(Submission, {"id": "r-1", "model_line": "faces", "target": target}, "file")
    ledger = Ledger(store, clock)
    ledger.submit("r-1", "faces", TARGETS["class"])
    redact_request(store, "r-1", keep_hashes=True)
    with pytest.raises(UsageError, match="sha256"):
        ledger.submit("r-2", "faces", ledger.get("r-1").target)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("samples", "2 samples (redacted)"),
        ("manifest", "samples of a manifest (redacted)"),
        ("subject", "1 subject (redacted)"),
        ("class", "class 3 (redacted)"),
        ("concept", "1 concept by 2 prompts (redacted)"),
    ],
)
def test_the_summary_of_a_redacted_target(store, clock, name, text):
    ledger = Ledger(store, clock)
    ledger.submit("r-1", "faces", TARGETS[name])
    redact_request(store, "r-1", keep_hashes=True)
    assert summarise(ledger.get("r-1").target) == text
