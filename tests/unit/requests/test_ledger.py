import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from salun_core.data.targets import ClassTarget, SamplesTarget, SubjectTarget
from salun_core.digest import sha256_bytes
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from salun_core.storage import split_uri
from salun_core.storage.keys import event_key, request_key
from salun_core.storage.s3 import S3Store
from tests.support.decisions import PROCEDURE

TARGET = SamplesTarget(ids=["img-1", "img-2"])


@pytest.fixture
def filed(ledger):
    ledger.submit("r-1", "faces", TARGET)
    return ledger


def keys(store):
    return [entry.key for entry in store.list("")]


def overwrite(store, key, data):
    store.delete(key)
    store.put_new(key, data)


class Dying(S3Store):
    """A store whose process is killed after it has written a request."""

    def put_new(self, key, data):
        etag = super().put_new(key, data)
        if key.startswith("requests/"):
            os.kill(os.getpid(), signal.SIGKILL)
        return etag


def file_and_die(uri, clock):
    Ledger(Dying(*split_uri(uri)), clock).submit("r-1", "faces", TARGET)


def walk(ledger, *ways, request="r-1"):
    for way in ways:
        outcome = Outcome.UNLEARNED if way == "completed" else None
        assurance = PROCEDURE if way == "completed" else None
        ledger.move(request, Transition(Status(way), "sweep", "test", outcome=outcome, assurance=assurance))


class TestSubmit:
    def test_it_is_received_due_in_a_month_and_queued(self, ledger, store):
        receipt = ledger.submit("r-1", "faces", TARGET, source="ticket 7")
        assert (receipt.received_at, receipt.due_at) == ("2026-01-31T09:00:00+00:00", "2026-02-28T09:00:00+00:00")
        assert receipt.sha256 == sha256_bytes(store.get(request_key("r-1")).data)
        state = ledger.state("r-1")
        assert (state.status, state.request.target, state.request.source) == (Status.QUEUED, TARGET, "ticket 7")
        assert keys(store) == [
            "index/queued/faces/1769850000.000001.r-1",
            "requests/r-1/events/000001.json",
            "requests/r-1/request.json",
        ]
        (event,) = ledger.events("r-1")
        assert (event.n, event.from_status, event.to_status, event.attempt) == (1, "received", "queued", 1)

    def test_filing_again_gives_the_same_receipt_and_writes_nothing(self, ledger, clock, store):
        first = ledger.submit("r-1", "faces", TARGET)
        before = [(entry.key, entry.etag) for entry in store.list("")]
        clock.tick(days=3)
        assert ledger.submit("r-1", "faces", TARGET) == first
        assert ledger.submit("r-1", "faces", TARGET, datetime(2026, 1, 31, 9, tzinfo=UTC)) == first
        assert [(entry.key, entry.etag) for entry in store.list("")] == before

    def test_filing_again_does_not_change_the_status(self, ledger):
        receipt = ledger.submit("r-1", "faces", TARGET)
        walk(ledger, "in_progress", "completed")
        assert ledger.submit("r-1", "faces", TARGET) == receipt
        assert ledger.status("r-1") is Status.COMPLETED

    @pytest.mark.parametrize(
        "other",
        [
            {"model_line": "cats"},
            {"target": SamplesTarget(ids=["img-1"])},
            {"target": SubjectTarget(subject_ref="img-1")},
            {"received_at": datetime(2026, 1, 30, tzinfo=UTC)},
            {"source": "ticket 8"},
        ],
    )
    def test_other_content_under_the_same_id_is_a_conflict(self, ledger, store, other):
        ledger.submit("r-1", "faces", TARGET)
        before = store.get(request_key("r-1")).data
        with pytest.raises(ConflictError, match="request r-1 exists already") as caught:
            ledger.submit(**{"request_id": "r-1", "model_line": "faces", "target": TARGET, **other})
        assert caught.value.exit_code == 4
        assert store.get(request_key("r-1")).data == before
        assert len(ledger.events("r-1")) == 1

    def test_the_given_time_is_stored_in_utc(self, ledger):
        receipt = ledger.submit("r-1", "faces", TARGET, datetime.fromisoformat("2026-01-01T01:00+02:00"))
        assert (receipt.received_at, receipt.due_at) == ("2025-12-31T23:00:00+00:00", "2026-01-31T23:00:00+00:00")

    def test_a_time_in_the_future_is_refused_beyond_a_small_tolerance(self, ledger, clock, store):
        with pytest.raises(UsageError, match="in the future"):
            ledger.submit("r-1", "faces", TARGET, clock() + timedelta(hours=1))
        assert keys(store) == []
        ledger.submit("r-1", "faces", TARGET, clock() + timedelta(minutes=1))

    @pytest.mark.parametrize("bad", ["../r", "R 1", ""])
    def test_an_invalid_id_writes_nothing(self, ledger, store, bad):
        with pytest.raises(UsageError):
            ledger.submit(bad, "faces", TARGET)
        with pytest.raises(UsageError):
            ledger.submit("r-1", bad, TARGET)
        assert keys(store) == []

    def test_concurrent_equal_submits_give_one_request_and_one_receipt(self, real_store, clock):
        store = real_store
        gate = threading.Barrier(8)

        def file(number):
            own = Ledger(store, lambda: clock() + timedelta(seconds=number))
            gate.wait()
            return own.submit("r-1", "faces", TARGET)

        with ThreadPoolExecutor(8) as pool:
            receipts = list(pool.map(file, range(8)))
        assert receipts == [receipts[0]] * 8
        assert len(keys(store)) == 3

    def test_one_of_concurrent_different_submits_wins(self, real_store, clock):
        store = real_store
        gate = threading.Barrier(8)

        def file(number):
            gate.wait()
            try:
                return Ledger(store, clock).submit("r-1", "faces", ClassTarget(class_id=number)).sha256
            except ConflictError:
                return None

        with ThreadPoolExecutor(8) as pool:
            won = [digest for digest in pool.map(file, range(8)) if digest]
        assert won == [sha256_bytes(store.get(request_key("r-1")).data)]
        assert Ledger(store, clock).status("r-1") is Status.QUEUED

    def test_the_next_submit_completes_one_killed_before_its_event(self, real_store, clock):
        store, ledger = real_store, Ledger(real_store, clock)
        child = multiprocessing.get_context("fork").Process(target=file_and_die, args=(store.uri, clock))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert keys(store) == ["index/queued/faces/1769850000.000001.r-1", "requests/r-1/request.json"]
        assert ledger.status("r-1") is Status.RECEIVED
        assert [state.status for state in ledger.list()] == [Status.RECEIVED]
        assert [state.status for state in ledger.list(statuses=[Status.RECEIVED])] == [Status.RECEIVED]
        assert ledger.list(statuses=[Status.QUEUED]) == []
        assert ledger.events("r-1") == []
        clock.tick(hours=1)
        receipt = ledger.submit("r-1", "faces", TARGET)
        assert receipt.received_at == "2026-01-31T09:00:00+00:00"
        assert ledger.status("r-1") is Status.QUEUED

    def test_a_request_without_events_can_be_held_and_filing_again_keeps_the_hold(self, ledger, store):
        ledger.submit("r-1", "faces", TARGET)
        store.delete(event_key("r-1", 1))
        ledger.hold("r-1", "ana", "identity in doubt")
        ledger.submit("r-1", "faces", TARGET)
        assert ledger.status("r-1") is Status.ON_HOLD


class TestMove:
    def test_every_transition_is_logged(self, filed, clock):
        filed.hold("r-1", "ana", "in doubt")
        clock.tick(days=2)
        filed.release("r-1", "ana", "confirmed")
        filed.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-1"))
        filed.move("r-1", Transition(Status.QUEUED, "sweep", "gate refused", run="run-1"))
        filed.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-2"))
        last = filed.move(
            "r-1",
            Transition(
                Status.COMPLETED, "sweep", "published", run="run-2", outcome=Outcome.UNLEARNED, assurance=PROCEDURE
            ),
        )
        events = filed.events("r-1")
        assert [event.n for event in events] == [1, 2, 3, 4, 5, 6, 7]
        assert [event.attempt for event in events] == [1, 1, 1, 1, 2, 2, 2]
        assert events[-1] == last
        assert (last.run, last.outcome, last.actor) == ("run-2", Outcome.UNLEARNED, "sweep")
        assert events[2].at == "2026-02-02T09:00:00+00:00"
        assert filed.status("r-1") is Status.COMPLETED

    @pytest.mark.parametrize(
        ("ways", "to"),
        [
            ((), "completed"),
            ((), "rejected"),
            (("in_progress",), "cancelled"),
            (("in_progress",), "on_hold"),
            (("cancelled",), "queued"),
            (("in_progress", "completed"), "failed"),
        ],
    )
    def test_a_transition_that_is_not_allowed_is_a_conflict_and_writes_nothing(self, filed, store, ways, to):
        walk(filed, *ways)
        before = keys(store)
        outcome = Outcome.UNLEARNED if to == "completed" else None
        with pytest.raises(ConflictError, match=f"cannot move from .* to {to}"):
            filed.move("r-1", Transition(Status(to), "sweep", "test", outcome=outcome))
        assert keys(store) == before

    @pytest.mark.parametrize(("end", "verb"), [("completed", "reopen"), ("failed", "retry")])
    def test_only_retry_and_reopen_queue_a_closed_request(self, filed, end, verb):
        walk(filed, "in_progress", "queued", "in_progress", end)
        with pytest.raises(ConflictError, match=f"salun request {verb} r-1"):
            filed.move("r-1", Transition(Status.QUEUED, "sweep", "test"))
        event = getattr(filed, verb)("r-1", "ana", "rolled back")
        assert (event.to_status, event.attempt) == (Status.QUEUED, 1)

    def test_a_run_records_epoch_level_and_group(self, filed):
        details = {"run": "run-1", "epoch": 7, "level": 2, "group": "run-0-a"}
        taken = filed.move(filed.state("r-1"), Transition(Status.IN_PROGRESS, "sweep", "claimed", **details))
        assert (taken.run, taken.epoch, taken.rung, taken.group) == ("run-1", 7, 2, "run-0-a")
        back = filed.move("r-1", Transition(Status.QUEUED, "sweep", "failed"))
        assert (back.epoch, back.rung, back.group) == (None, 2, None)
        filed.move("r-1", Transition(Status.FAILED, "sweep", "used up", level=3))
        assert filed.retry("r-1", "ana", "again").rung == 0

    @pytest.mark.parametrize("verb", ["release", "retry", "reopen"])
    def test_queueing_again_from_another_status_is_refused(self, filed, verb):
        walk(filed, "in_progress")
        with pytest.raises(ConflictError, match="request r-1 is in_progress"):
            getattr(filed, verb)("r-1", "ana", "by mistake")
        assert filed.status("r-1") is Status.IN_PROGRESS

    def test_a_transition_from_an_older_state_is_refused(self, filed):
        seen = filed.state("r-1")
        walk(filed, "in_progress", "queued")
        with pytest.raises(ConflictError, match="another process moved request r-1 meanwhile: event 2 exists"):
            filed.move(seen, Transition(Status.IN_PROGRESS, "sweep", "late"))
        assert filed.move(filed.state("r-1"), Transition(Status.IN_PROGRESS, "sweep", "in time")).n == 4

    @pytest.mark.parametrize("fields", [{"reason": ""}, {"actor": ""}, {"reason": "a\nb"}, {"run": "../x"}])
    def test_an_invalid_argument_is_refused(self, filed, fields):
        with pytest.raises(UsageError, match="a transition of request r-1"):
            filed.move("r-1", Transition(**{"to": Status.ON_HOLD, "actor": "ana", "reason": "test", **fields}))

    def test_an_outcome_goes_with_completed_only(self, filed):
        with pytest.raises(UsageError, match="outcome"):
            filed.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed", outcome=Outcome.UNLEARNED))
        walk(filed, "in_progress")
        with pytest.raises(UsageError, match="outcome"):
            filed.move("r-1", Transition(Status.COMPLETED, "sweep", "published"))

    def test_racing_movers_have_one_winner_for_each_event(self, real_store, clock):
        """Also with equal transitions: same actor, time and statuses; the store must not treat them as one write."""
        store, filed = real_store, Ledger(real_store, clock)
        filed.submit("r-1", "faces", TARGET)
        rounds, workers = 3, 6
        gate = threading.Barrier(workers)

        def race(_):
            own, won = Ledger(store, clock), []
            for number in range(rounds):
                to = Status.ON_HOLD if number % 2 == 0 else Status.QUEUED
                seen = own.state("r-1")
                gate.wait()
                with contextlib.suppress(ConflictError):
                    won.append(own.move(seen, Transition(to, "racer", "race")).n)
                gate.wait()
            return won

        with ThreadPoolExecutor(workers) as pool:
            won = [number for numbers in pool.map(race, range(workers)) for number in numbers]
        assert sorted(won) == list(range(2, rounds + 2))
        assert [event.n for event in filed.events("r-1")] == list(range(1, rounds + 2))
        assert [state.last.n for state in filed.list(statuses=[Status.ON_HOLD])] == [rounds + 1]
        assert [key for key in keys(store) if key.startswith("index/")] == [
            f"index/on_hold/faces/1769850000.{rounds + 1:06d}.r-1"
        ]


class TestReading:
    def test_an_unknown_id_names_the_nearest(self, filed):
        calls = [filed.get, filed.state, filed.status, filed.events, lambda name: filed.hold(name, "ana", "test")]
        for call in calls:
            with pytest.raises(UsageError, match="did you mean 'r-1'"):
                call("r-2")

    def test_an_id_that_is_a_prefix_of_another_is_unknown(self, filed):
        with pytest.raises(UsageError, match="unknown request 'r'"):
            filed.status("r")

    def test_list_filters_and_sorts_by_due_time(self, ledger, clock):
        for number in range(6):
            received = clock() - timedelta(days=10 * number)
            ledger.submit(f"r-{number}", "faces" if number % 2 else "cats", TARGET, received)
        ledger.hold("r-3", "ana", "in doubt")

        def ids(**filters):
            return [state.request.id for state in ledger.list(**filters)]

        assert ids() == ["r-5", "r-4", "r-3", "r-2", "r-1", "r-0"]
        assert ids(line="faces") == ["r-5", "r-3", "r-1"]
        assert ids(statuses=[Status.ON_HOLD]) == ["r-3"]
        assert ids(line="cats", statuses=[Status.ON_HOLD]) == []
        due = ledger.get("r-3").due
        assert ids(due_before=due) == ["r-5", "r-4"]
        assert ids(due_before=due + timedelta(seconds=1)) == ["r-5", "r-4", "r-3"]
        assert ids(line="faces", statuses=[Status.QUEUED], due_before=due) == ["r-5"]

    def test_an_empty_ledger_lists_nothing(self, ledger):
        assert list(ledger.list()) == []

    def test_list_agrees_with_each_state(self, ledger):
        for number in range(6):
            ledger.submit(f"r-{number}", "faces", TARGET)
            for _ in range(number % 3):
                ledger.move(f"r-{number}", Transition(Status.IN_PROGRESS, "sweep", "claimed"))
                ledger.move(f"r-{number}", Transition(Status.QUEUED, "sweep", "refused"))
        listed = {state.request.id: state for state in ledger.list()}
        assert listed == {f"r-{number}": ledger.state(f"r-{number}") for number in range(6)}

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_missing_event_is_an_error(self, filed, store, number):
        walk(filed, "in_progress", "queued")
        store.delete(event_key("r-1", number))
        for call in (filed.status, filed.events, filed.state, lambda name: filed.hold(name, "ana", "test")):
            with pytest.raises(IntegrityError, match="r-1"):
                call("r-1")

    def test_list_refuses_a_gap(self, filed, store):
        walk(filed, "in_progress", "queued")
        store.delete(event_key("r-1", 2))
        with pytest.raises(IntegrityError, match="r-1"):
            filed.list()

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format": "salun.event/v2"}'])
    def test_a_damaged_document_is_refused(self, filed, store, data):
        overwrite(store, event_key("r-1", 1), data)
        with pytest.raises(IntegrityError):
            filed.status("r-1")
        overwrite(store, request_key("r-1"), data)
        with pytest.raises(IntegrityError):
            filed.get("r-1")

    def test_a_copied_document_is_refused(self, filed, store):
        filed.submit("r-2", "faces", ClassTarget(class_id=1))
        overwrite(store, request_key("r-2"), store.get(request_key("r-1")).data)
        overwrite(store, event_key("r-2", 1), store.get(event_key("r-1", 1)).data)
        with pytest.raises(IntegrityError, match="copied or moved"):
            filed.get("r-2")
        with pytest.raises(IntegrityError, match="copied or moved"):
            filed.status("r-2")

    def test_events_that_do_not_follow_are_refused(self, filed, store):
        walk(filed, "in_progress", "queued")
        hold = filed.hold("r-1", "ana", "test").model_copy(update={"n": 3})
        overwrite(store, event_key("r-1", 3), hold.canonical())
        with pytest.raises(IntegrityError, match="does not follow"):
            filed.events("r-1")


class TestDryRun:
    def test_it_checks_and_returns_results_but_writes_nothing(self, store, clock, ledger):
        dry = Ledger(store, clock, dry_run=True)
        receipt = dry.submit("r-1", "faces", TARGET)
        assert keys(store) == []
        assert ledger.submit("r-1", "faces", TARGET) == receipt
        before = keys(store)
        assert dry.submit("r-1", "faces", TARGET) == receipt
        assert dry.hold("r-1", "ana", "test").n == 2
        with pytest.raises(ConflictError):
            dry.submit("r-1", "cats", TARGET)
        with pytest.raises(ConflictError):
            dry.release("r-1", "ana", "test")
        assert keys(store) == before
