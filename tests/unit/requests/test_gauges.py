"""The ledger's gauges: counted from the index of a real store, with deadlines to the second."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from salun_core.cli.app import app
from salun_core.cli.output import MODE
from salun_core.data.targets import SubjectTarget
from salun_core.gate import Assurance
from salun_core.registry.versions import publish
from salun_core.requests.gauges import GaugeReader, stages
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status, is_overdue
from salun_core.storage.keys import event_key, head_key, index_key, version_key
from tests.support.decisions import PROCEDURE
from tests.support.manual_clock import ManualClock

TARGET = SubjectTarget(subject_ref="person-07")


class Counted:
    """A store that writes down what is read."""

    def __init__(self, store):
        self._store, self.read = store, []

    def list(self, prefix):
        self.read.append(prefix)
        return self._store.list(prefix)

    def get(self, key):
        self.read.append(key)
        return self._store.get(key)


@pytest.fixture
def clock():
    return ManualClock(datetime(2026, 3, 1, 9, tzinfo=UTC))


@pytest.fixture
def ledger(store, clock):
    return Ledger(store, clock)


def file(ledger, *ids, line="faces", received=None):
    for request in ids:
        ledger.submit(request, line, TARGET, received_at=received)


def complete(ledger, request, assurance=PROCEDURE):
    ledger.move(request, Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-1"))
    done = Transition(Status.COMPLETED, "sweep", "published", run="run-1", outcome=Outcome.UNLEARNED)
    ledger.move(request, replace(done, assurance=assurance))


def counts(snapshot):
    told = {labels["status"]: value for name, labels, value in snapshot.at(0.0) if name == "salun_requests"}
    assert set(told) == {status.value for status in Status}  # a status without requests is told as 0
    return {status: value for status, value in told.items() if value}


def values(snapshot, now):
    return {(name, *labels.values()): value for name, labels, value in snapshot.at(now.timestamp())}


def test_requests_are_counted_where_they_stand(store, ledger, clock):
    file(ledger, "r-1", "r-2", "r-3", "r-4", "r-5", "r-6")
    ledger.hold("r-2", "ana", "checking")
    ledger.cancel("r-3", "ana", "withdrawn")
    complete(ledger, "r-4")
    ledger.move("r-5", Transition(Status.FAILED, "sweep", "attempts used up"))
    ledger.move("r-6", Transition(Status.IN_PROGRESS, "sweep", "claimed", run="run-2"))
    everywhere = {"queued": 1, "on_hold": 1, "cancelled": 1, "completed": 1, "failed": 1, "in_progress": 1}
    assert counts(GaugeReader(store, clock).take()) == everywhere


def by_level(snapshot):
    found = {labels["level"]: value for name, labels, value in snapshot.at(0.0) if name == "salun_requests_by_level"}
    return {level: value for level, value in found.items() if value}


def test_completed_requests_are_counted_by_level_and_each_event_is_read_once(store, ledger, clock, monkeypatch):
    file(ledger, "r-1", "r-2", "r-3", "r-4")
    complete(ledger, "r-1")
    store.put_if(event_key("r-1", 3), b"{}", store.get(event_key("r-1", 3)).etag)
    complete(ledger, "r-2", Assurance(level="procedure", n=5))
    complete(ledger, "r-3", Assurance(level="measured", n=200))
    counted = Counted(store)
    reader = GaugeReader(counted, clock)
    assert by_level(reader.take()) == {"damaged": 1, "procedure": 1, "measured": 1}
    clock.now += timedelta(hours=1)
    complete(ledger, "r-4", Assurance(level="procedure", n=5))
    ledger.reopen("r-3", "ana", "rolled back")
    counted.read.clear()
    assert by_level(reader.take()) == {"damaged": 1, "procedure": 2}
    assert [key for key in counted.read if "/events/" in key] == [event_key("r-4", 3)]
    monkeypatch.setattr("salun_core.requests.gauges._EVENTS_AT_ONCE", 1)
    fresh = GaugeReader(store, clock)
    assert by_level(fresh.take())["not_read"] == 2  # a part at a time, so that no refresh takes long
    for _ in range(2):
        clock.now += timedelta(hours=1)
        last = by_level(fresh.take())
    assert last == {"damaged": 1, "procedure": 2}


def test_an_empty_store_has_nothing_old_and_nothing_late(store, clock):
    told = values(GaugeReader(store, clock).take(), clock.now)
    assert set(told.values()) == {0}
    assert ("salun_requests_overdue",) in told


MOMENTS = [
    "2027-12-30T23:59:59+00:00",  # due 30 January
    "2028-01-29T12:00:00+00:00",  # 29 February, a leap year
    "2028-01-30T12:00:00+00:00",  # 29 February
    "2028-01-31T12:00:00+00:00",  # 29 February
    "2028-02-29T00:00:00+00:00",  # 29 March
    "2028-03-31T08:30:00+00:00",  # 30 April
    "2026-12-31T08:30:00+00:00",  # 31 January
    "2027-01-31T12:00:00+02:00",  # 28 February
]


def test_the_overdue_are_exactly_those_whose_month_is_over(store, ledger, clock):
    clock.now = datetime(2029, 1, 1, tzinfo=UTC)
    for number, received in enumerate(MOMENTS):
        file(ledger, f"r-{number}", received=datetime.fromisoformat(received))
    ledger.hold("r-1", "ana", "a hold stops the erasure and not the clock")
    ledger.move("r-2", Transition(Status.FAILED, "sweep", "still owed"))
    complete(ledger, "r-3")
    snapshot, states = GaugeReader(store, clock).take(), ledger.list()
    seconds = [timedelta(seconds=n) for n in (-1, 0, 1)]
    for now in sorted(state.request.due + step for state in states for step in seconds):
        late = sum(is_overdue(state.request, state.status, now) for state in states)
        assert values(snapshot, now)["salun_requests_overdue",] == late, now
    assert late == len(MOMENTS) - 1


def test_ages_and_stages_go_on_between_two_snapshots(store, ledger, clock):
    start = clock.now
    file(ledger, "r-1")
    file(ledger, "r-2", received=start - timedelta(days=2))
    snapshot = GaugeReader(store, clock).take()
    # each is due in its own month: 31 days from 1 March, 28 from 27 February
    expected = {
        timedelta(0): (0, 0, 0, 0),
        timedelta(days=5, seconds=1): (1, 0, 0, 0),
        timedelta(days=7, seconds=1): (2, 0, 0, 0),
        timedelta(days=12, seconds=1): (2, 1, 0, 0),
        timedelta(days=15.5, seconds=1): (2, 2, 0, 0),
        timedelta(days=20.4, seconds=1): (2, 2, 1, 0),
        timedelta(days=24.8, seconds=1): (2, 2, 2, 0),
        timedelta(days=26, seconds=1): (2, 2, 2, 1),
        timedelta(days=31, seconds=1): (2, 2, 2, 2),
    }
    for later, late in expected.items():
        told = values(snapshot, start + later)
        stage = [told["salun_requests_by_deadline", name] for name in ("target", "half", "most")]
        assert (*stage, told["salun_requests_overdue",]) == late, later
        assert told["salun_oldest_request_age_seconds",] == (later + timedelta(days=2)).total_seconds()


def test_the_stages_follow_each_other_in_every_month():
    for day in range(366 * 2):
        received = datetime(2027, 1, 1, 5, tzinfo=UTC) + timedelta(days=day)
        times = list(stages(received).values())
        assert received < times[0] < times[1] < times[2] < times[3]


def test_a_request_that_is_being_moved_counts_once(store, ledger, clock):
    file(ledger, "r-1", "r-2")
    store.put_new(entry("in_progress", clock, 2, "r-1"), b"")
    snapshot = GaugeReader(store, clock).take()
    assert counts(snapshot) == {"queued": 1, "in_progress": 1}
    assert len(snapshot.passing["overdue"]) == 2


def entry(status, clock, number, request):
    return index_key(status, "faces", int(clock.now.timestamp()), number, request)


def test_what_a_crash_left_in_the_index_settles_nothing_and_owes_nothing(store, ledger, clock):
    file(ledger, "r-1", "r-2", "r-3")
    reader = GaugeReader(store, clock)
    complete(ledger, "r-1")
    store.put_new(entry("queued", clock, 1, "r-1"), b"")  # the event was written, its old entry not taken away
    store.put_new(entry("completed", clock, 2, "r-2"), b"")  # the event was not written
    ledger.cancel("r-3", "ana", "withdrawn")
    for _ in range(2):  # the second time it only remembers
        snapshot = reader.take()
        assert counts(snapshot) == {"completed": 1, "queued": 1, "cancelled": 1}
        assert len(snapshot.passing["overdue"]) == 1
    ledger.reopen("r-1", "ana", "rolled back")
    assert len(reader.take().passing["overdue"]) == 2


def test_only_the_open_statuses_are_listed_each_time_and_no_request_is_read(store, ledger, clock):
    file(ledger, "r-1", "r-2")
    complete(ledger, "r-1")
    counted = Counted(store)
    reader = GaugeReader(counted, clock)
    reader.take()
    assert [key for key in counted.read if key.startswith("requests")] == [event_key("r-1", 3)]  # has its level
    counted.read.clear()
    clock.now += timedelta(seconds=599)
    complete(ledger, "r-2")
    told = counts(reader.take())
    assert counted.read == [f"index/{status}/" for status in ("received", "on_hold", "queued", "in_progress", "failed")]
    assert told == {"completed": 1}  # the count of the settled may lag; what is owed may not
    clock.now += timedelta(seconds=1)
    assert counts(reader.take()) == {"completed": 2}


def version(line="faces", **fields):
    lineage = {"runs_since_training": 2, "forgotten_since_training": 30, "trained_on": 600}
    return {"line": line, "parent": None, "method": "salun", "lineage": lineage, **fields}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    return {"w": path}


def test_debt_and_last_success_come_from_head(store, clock, weights):
    first, _ = publish(store, version(lineage={"trained_on": 600}), weights)
    counted = Counted(store)
    reader = GaugeReader(counted, clock)
    told = values(reader.take(), clock.now)
    assert told["salun_unlearning_debt_ratio", "faces"] == 0
    assert ("salun_last_success_timestamp_seconds", "faces") not in told  # no run has published yet
    second, _ = publish(store, version(parent=first.version, run="run-1"), weights)
    counted.read.clear()
    for _ in range(3):
        told = values(reader.take(), clock.now)
    assert told["salun_unlearning_debt_ratio", "faces"] == 0.05
    assert told["salun_runs_since_training", "faces"] == 2
    published = datetime.fromisoformat(second.published_at).timestamp()
    assert told["salun_last_success_timestamp_seconds", "faces"] == published
    assert counted.read.count(version_key("faces", second.version)) == 1  # a manifest never changes
    assert not [key for key in counted.read if key == "lines/"]


def test_a_new_line_shows_with_its_first_request(store, ledger, clock, weights):
    reader = GaugeReader(store, clock)
    reader.take()
    publish(store, version(), weights)
    file(ledger, "r-1")
    file(ledger, "r-2", line="nowhere")
    assert set(reader.take().lines) == {"faces"}


def test_a_damaged_line_hides_no_deadline_and_is_told(store, ledger, clock, weights, capsys):
    file(ledger, "r-1", line="broken")
    publish(store, version(), weights)
    publish(store, version("gone"), weights)
    publish(store, version("broken"), weights)
    head = store.get(head_key("broken"))
    store.put_if(head_key("broken"), head.data[:-9], head.etag)
    for entry in store.list("lines/gone/versions/"):
        store.delete(entry.key)
    reader = GaugeReader(store, clock)
    for _ in range(2):
        snapshot = reader.take()
    assert (set(snapshot.lines), snapshot.unreadable) == ({"faces"}, 2)
    assert counts(snapshot) == {"queued": 1}
    assert capsys.readouterr().err.count("model_line_unreadable") == 2  # each once


@pytest.fixture
def run():
    yield lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])
    MODE.json = MODE.debug = False


def test_once_prints_what_a_scrape_would_get(store, run):
    file(Ledger(store, lambda: datetime.now(UTC)), "r-17")
    done = run("exporter", "--once", "--store", store.uri)
    assert done.exit_code == 0, done.stderr
    assert 'salun_requests{status="queued"} 1.0' in done.stdout
    assert "r-17" not in done.stdout
    as_json = run("--json", "exporter", "--once", "--store", store.uri)
    assert '"metric": "salun_requests_overdue"' in as_json.stdout


def test_sigterm_ends_the_command(real_store):
    command = [sys.executable, "-c", "from salun_core.cli.app import main; main()"]
    process = subprocess.Popen(
        [*command, "exporter", "--port", "0", "--store", real_store.uri],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/metrics)\n", process.stdout.readline())[1]
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert "salun_build_info" in answer.read().decode()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    assert (process.returncode, said) == (143, "")
