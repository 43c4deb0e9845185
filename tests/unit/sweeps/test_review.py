"""What a sweep cannot match with the data is held for a person: never guessed, and never certified as done."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from salun_core.cli.app import app
from salun_core.data import DataSpec, load_data
from salun_core.data.split import make_split
from salun_core.data.targets import ClassTarget, SamplesTarget, SubjectTarget
from salun_core.errors import ConflictError
from salun_core.requests.ledger import Transition
from salun_core.requests.resolve import TableResolver
from salun_core.requests.schema import Outcome, Review, Status
from salun_core.storage.keys import certificate_key
from salun_core.sweeps.claim import Skipped, claim
from salun_core.sweeps.settle import settle
from salun_core.tasks import TASKS
from salun_core.tasks.line import OpenLine
from salun_core.times import utc_clock
from tests.support import toy_line as toy

FOLDERS = [str(number) for number in range(1, 11)]  # the digit 3 lies in the folder 4


@pytest.fixture(scope="module")
def data():
    return load_data(DataSpec(source="digits"))


@pytest.fixture
def context(store):
    toy.begin(store)
    return toy.sweep_context(store)


@pytest.fixture
def invoke(store):
    return lambda *args: CliRunner().invoke(app, ["request", *args, "--store", store.uri])


def submit(context, *targets):
    start = utc_clock() - timedelta(hours=1)
    for number, target in enumerate(targets):
        context.ledger.submit(f"r-{number}", toy.LINE, target, start + timedelta(minutes=number))


def claimed(context, table, split, run="run-1"):
    line = OpenLine(context.store, toy.LINE)
    found = claim(context, line, run, toy.policy(), lambda _: TableResolver(table, split, TASKS["classification"]))
    if found.record is None:
        settle(context, toy.LINE, run)  # gives the line back
    return found


def standing(context, number=0):
    last = context.ledger.state(f"r-{number}").last
    return last.to_status, last.outcome


def test_an_unknown_id_is_held_and_one_that_was_not_trained_on_is_certified(context, data):
    submit(context, SamplesTarget(ids=["no-such-digit"]), SamplesTarget(ids=data.split.ids("test")[:1]))
    found = claimed(context, data.table, data.split)
    assert (found.record, list(found.held), list(found.nothing_to_erase)) == (None, ["r-0"], ["r-1"])
    assert standing(context, 0) == (Status.ON_HOLD, Review.UNMATCHED)
    assert standing(context, 1) == (Status.COMPLETED, Outcome.NOTHING_TO_ERASE)
    assert context.store.get(certificate_key("r-0")) is None
    assert "no-such-digit" not in context.ledger.state("r-0").last.reason
    assert claimed(context, data.table, data.split, "run-2").skipped is Skipped.NO_REQUESTS


def test_one_unknown_id_holds_the_whole_request_until_a_person_leaves_it_out(context, data):
    submit(context, SamplesTarget(ids=[*data.split.ids("train")[:2], "no-such-digit"]))
    assert claimed(context, data.table, data.split).reason == "1 held for review, and nothing else is to be erased"
    assert context.ledger.state("r-0").last.reason == "one name is not in the data; of what it names, 2 are in training"
    context.ledger.release("r-0", "ana", "the data were mended")
    assert list(claimed(context, data.table, data.split, "run-2").held) == ["r-0"]
    context.ledger.release("r-0", "ana", "the third one was a typing error", known_only=True)
    (member,) = claimed(context, data.table, data.split, "run-3").record.members
    assert (member.found, member.named) == (2, 3)
    last = context.ledger.move("r-0", Transition(Status.QUEUED, "sweep", "the run failed"))
    assert last.known_only  # the next attempt needs no second decision


def test_a_request_of_unknown_names_alone_is_never_completed(context, data):
    submit(context, SamplesTarget(ids=["no-such-digit", data.split.ids("test")[0]]))
    claimed(context, data.table, data.split)
    context.ledger.release("r-0", "ana", "go on", known_only=True)
    assert list(claimed(context, data.table, data.split, "run-2").held) == ["r-0"]
    assert standing(context) == (Status.ON_HOLD, Review.UNMATCHED)


def test_a_person_that_the_data_do_not_know_is_held(context, data):
    table = data.table.with_subjects({sample: "ann" for sample in data.split.ids("train")[:3]})
    table = dataclasses.replace(table, subjects=[*table.subjects[:-1], "bob"])
    split = data.split.without([table.ids[-1]])
    submit(
        context, SubjectTarget(subject_ref="carl"), SubjectTarget(subject_ref="bob"), SubjectTarget(subject_ref="ann")
    )
    found = claimed(context, table, split)
    assert (list(found.held), list(found.nothing_to_erase)) == (["r-0"], ["r-1"])
    assert [member.id for member in found.record.members] == ["r-2"]


def test_a_class_that_may_be_two_is_held_and_never_guessed(context, data):
    table = dataclasses.replace(data.table, classes=FOLDERS)
    split = make_split(table, data.spec)
    submit(context, ClassTarget(class_id=3), ClassTarget(class_name="3"), ClassTarget(class_id=10))
    found = claimed(context, table, split)
    assert list(found.held) == ["r-0"]
    assert standing(context) == (Status.ON_HOLD, Review.AMBIGUOUS)
    assert "class_name" in context.ledger.state("r-0").last.reason
    assert [member.id for member in found.record.members] == ["r-1", "r-2"]
    erased = {name for name in split.train if table.labels[table.position[name]] in (2, 9)}
    assert found.record.forget_count == len(erased)


def test_a_request_that_an_earlier_attempt_took_is_held_too(context, data):
    submit(context, SamplesTarget(ids=["no-such-digit"]))
    context.ledger.move("r-0", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-1"))
    assert list(claimed(context, data.table, data.split).held) == ["r-0"]
    assert standing(context) == (Status.ON_HOLD, Review.UNMATCHED)


def test_lists_and_statuses_show_what_a_person_must_review(context, data, invoke):
    submit(context, SamplesTarget(ids=["no-such-digit"]), SamplesTarget(ids=data.split.ids("test")[:1]))
    claimed(context, data.table, data.split)
    text = invoke("list").stdout
    assert "on_hold: unmatched" in text
    assert "completed: nothing_to_erase" in text
    rows = {row["id"]: row["outcome"] for row in json.loads(invoke("list", "--json").stdout)}
    assert rows == {"r-0": "unmatched", "r-1": "nothing_to_erase"}
    assert invoke("show", "r-0").stdout.startswith("r-0: on_hold: unmatched, due ")
    assert json.loads(invoke("show", "r-0", "--json").stdout)["outcome"] == "unmatched"
    released = invoke("release", "r-0", "--reason", "mended").stdout
    assert released.startswith("r-0: on_hold -> queued (event 3)\nthe next sweep looks it up again, and holds it again")
    claimed(context, data.table, data.split, "run-2")
    told = json.loads(invoke("release", "r-0", "--known-only", "--reason", "mended", "--json").stdout)
    assert (told["known_only"], "erases what the data have" in told["then"]) == (True, True)


def test_outcomes_belong_to_their_statuses(context):
    submit(context, SamplesTarget(ids=["x"]))
    with pytest.raises(Exception, match="needs the status on_hold"):
        context.ledger.move("r-0", Transition(Status.IN_PROGRESS, "sweep", "claimed", outcome=Review.UNMATCHED))
    with pytest.raises(Exception, match="need each other"):
        context.ledger.move("r-0", Transition(Status.ON_HOLD, "ana", "doubt", outcome=Outcome.UNLEARNED))
    with pytest.raises(ConflictError):
        context.ledger.release("r-0", "ana", "not held")
