import json

import pytest

from salun_core.data.forget import ClassTarget, SamplesTarget, SubjectTarget, read_targets
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import ConflictError, UsageError
from salun_core.requests.batching import seal_batch
from salun_core.storage import split_uri

pytestmark = pytest.mark.s3

TARGETS = [
    SamplesTarget(ids=["img-1", "img-2"]),
    ClassTarget(class_id=3, dataset_digest="a" * 64),
    SubjectTarget(subject_ref="person-7"),
    SamplesTarget(ids=["img-1", "img-2"]),
]


@pytest.fixture
def requests(ledger):
    for number, target in enumerate(TARGETS):
        ledger.submit(f"r-{number}", "faces", target)
    return [ledger.get(f"r-{number}") for number in range(len(TARGETS))]


def test_the_batch_is_the_union_of_the_targets(store, requests, tmp_path):
    batch = seal_batch(store, requests, "run-1")
    assert batch.uri == f"{store.uri}/scratch/run-1/forget.json"
    assert batch.targets == 3
    data = store.get("scratch/run-1/forget.json").data
    assert batch.sha256 == sha256_bytes(data)
    assert split_uri(batch.uri)[1].endswith("scratch/run-1/forget.json")
    (tmp_path / "forget.json").write_bytes(data)
    read = read_targets(tmp_path / "forget.json")
    assert len(read) == 3
    assert all(target in read for target in TARGETS)


def test_it_names_no_request_and_its_order_tells_nothing(store, requests):
    seal_batch(store, requests, "run-1")
    seal_batch(store, list(reversed(requests)), "run-2")
    first, second = (store.get(f"scratch/{run}/forget.json").data for run in ("run-1", "run-2"))
    assert first == second
    assert b"r-0" not in first


def test_targets_stand_in_the_order_of_their_text(store, ledger):
    for number in range(12):
        ledger.submit(f"r-{number}", "faces", ClassTarget(class_id=11 - number))
    seal_batch(store, [ledger.get(f"r-{number}") for number in range(12)], "run-1")
    targets = [canonical_json(target) for target in json.loads(store.get("scratch/run-1/forget.json").data)]
    assert targets == sorted(targets)
    assert len(targets) == 12


def test_sealing_again_is_harmless_and_another_batch_is_a_conflict(store, requests):
    assert seal_batch(store, requests, "run-1") == seal_batch(store, requests[:3], "run-1")
    with pytest.raises(ConflictError):
        seal_batch(store, requests[:2], "run-1")


def test_a_batch_of_nothing_or_of_two_lines_is_refused(store, ledger, requests):
    ledger.submit("other", "cats", TARGETS[0])
    with pytest.raises(UsageError, match="one model line, this one of 2: cats, faces"):
        seal_batch(store, [*requests, ledger.get("other")], "run-1")
    with pytest.raises(UsageError, match="one model line, this one of 0"):
        seal_batch(store, [], "run-1")
    with pytest.raises(UsageError, match="run"):
        seal_batch(store, requests, "../run")
    assert not list(store.list("scratch/"))
