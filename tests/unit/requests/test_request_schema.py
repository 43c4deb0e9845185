import json

import pytest

from salun_core.config import parse
from salun_core.data.targets import ClassTarget, ConceptTarget, SamplesTarget, SubjectTarget
from salun_core.errors import UsageError
from salun_core.requests.ledger import Transition, build_event
from salun_core.requests.schema import (
    TRANSITIONS,
    DeletionRequest,
    Outcome,
    RequestEvent,
    Status,
    Submission,
    summarise,
)
from salun_core.times import utc_clock
from tests.support.decisions import PROCEDURE

ALLOWED = """
received -> rejected | on_hold | queued | cancelled
on_hold -> queued | cancelled
queued -> on_hold | in_progress | failed | cancelled
in_progress -> completed | queued | failed
completed -> queued
failed -> queued
"""
WAYS = {
    (source.strip(), to.strip())
    for source, _, targets in (line.partition("->") for line in ALLOWED.strip().splitlines())
    for to in targets.split("|")
}
REQUEST = {
    "id": "r-1",
    "model_line": "faces",
    "target": {"kind": "samples", "ids": ["img-1"]},
    "received_at": "2026-01-31T09:00:00+00:00",
    "due_at": "2026-02-28T09:00:00+00:00",
}
EVENT = {
    "request": "r-1",
    "n": 1,
    "at": "2026-01-31T09:00:00+00:00",
    "actor": "ana",
    "from_status": "received",
    "to_status": "queued",
    "reason": "submitted",
    "attempt": 1,
    "writer": "0" * 32,
}


@pytest.mark.parametrize("source", Status)
@pytest.mark.parametrize("to", Status)
def test_the_transition_table(source, to):
    assert (to in TRANSITIONS[source]) == ((source.value, to.value) in WAYS)


@pytest.mark.parametrize("bad", ["", "-a", "A", "a" * 64, "a/b", "../a", "a b", "a\n", "ä"])
def test_an_id_that_is_not_a_safe_key_is_refused(bad):
    with pytest.raises(UsageError, match="id"):
        parse(Submission, {"id": bad, "model_line": "faces", "target": REQUEST["target"]}, "request")


@pytest.mark.parametrize("good", ["a", "0", "r-1.b_c", "a" * 63])
def test_an_id_of_the_pattern_is_accepted(good):
    assert parse(DeletionRequest, {**REQUEST, "id": good}, "request").id == good


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("received_at", "2026-01-31T09:00:00"),
        ("received_at", "2026-01-31T09:00:00+02:00"),
        ("received_at", "yesterday"),
        ("due_at", "2026-01-31T09:00:00+00:00"),
        ("model_line", "../other"),
        ("target", {"kind": "samples"}),
        ("target", {"kind": "person", "name": "ana"}),
        ("source", "line\nbreak"),
        ("format", "salun.request/v2"),
        ("extra", 1),
    ],
)
def test_an_invalid_request_is_refused(field, value):
    with pytest.raises(UsageError, match="1 fault"):
        parse(DeletionRequest, {**REQUEST, field: value}, "request")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"to_status": "completed"}, "cannot move from received to completed"),
        ({"outcome": "unlearned"}, "outcome"),
        ({"from_status": "in_progress", "to_status": "completed"}, "outcome"),
        ({"from_status": "in_progress", "to_status": "completed", "outcome": "lost"}, "outcome"),
        ({"from_status": "in_progress", "to_status": "completed", "outcome": "unlearned"}, "assurance level"),
        ({"n": 0}, "n:"),
        ({"n": 1_000_000}, "n:"),
        ({"n": "1"}, "n:"),
        ({"attempt": 0}, "attempt"),
        ({"actor": ""}, "actor"),
        ({"reason": "\x1b[2Jgone"}, "reason"),
        ({"reason": "x" * 501}, "reason"),
        ({"run": "../run"}, "run"),
        ({"writer": "me"}, "writer"),
    ],
)
def test_an_invalid_event_is_refused(changes, word):
    with pytest.raises(UsageError, match=word):
        parse(RequestEvent, {**EVENT, **changes}, "event")


def test_stored_bytes_parse_to_the_same_documents():
    request, event = parse(DeletionRequest, REQUEST, "request"), parse(RequestEvent, EVENT, "event")
    assert parse(DeletionRequest, json.loads(request.canonical()), "request") == request
    assert parse(RequestEvent, json.loads(event.canonical()), "event") == event
    assert json.loads(request.canonical())["format"] == "salun.request/v1"
    assert json.loads(event.canonical())["format"] == "salun.event/v1"


def test_attempts_count_runs_and_restart_when_a_person_queues():
    ways = ["received", "queued", "in_progress", "queued", "on_hold", "queued", "in_progress", "failed", "queued"]
    ways += ["in_progress", "completed", "queued"]
    last, attempts = None, []
    for number, (source, to) in enumerate(zip(ways, ways[1:], strict=False), 1):
        more = {"outcome": Outcome.UNLEARNED, "assurance": PROCEDURE} if to == "completed" else {}
        last = build_event("r-1", last, Transition(Status(to), "ana", "test", **more), utc_clock())
        assert (last.n, last.from_status) == (number, source)
        attempts.append(last.attempt)
    assert attempts == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (SamplesTarget(ids=["secret-1"]), "1 sample"),
        (SamplesTarget(ids=["secret-1", "secret-2"]), "2 samples"),
        (SamplesTarget(manifest_uri="s3://secret/ids.json", sha256="0" * 64), "samples of a manifest"),
        (ClassTarget(class_id=3), "class 3"),
        (SubjectTarget(subject_ref="secret"), "1 subject"),
        (ConceptTarget(prompts=["secret"], anchor_prompt="other", neighbours=["secret too"]), "1 concept by 1 prompt"),
    ],
)
def test_a_summary_holds_no_personal_data(target, text):
    assert summarise(target) == text
