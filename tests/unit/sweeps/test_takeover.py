"""A run dies or sleeps before each of its writes, and the next sweep takes its line over.

The clock is the store's: no test waits. In every trial no request is lost or erased twice, and the line is free.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from salun_core.errors import ConflictError, RunSettledError
from salun_core.registry.lookup import ancestry
from salun_core.requests.schema import Status
from salun_core.storage.keys import certificate_key
from salun_core.storage.leases import Life, holder_of
from salun_core.sweeps import heartbeat
from salun_core.sweeps.claim import Skipped
from salun_core.sweeps.policy import LEASE_SECONDS
from salun_core.sweeps.settle import settle
from tests.support import toy_line as toy
from tests.support.memory_store import Killed, MemoryFiles

LINE = toy.LINE
REQUESTS = {"r-1": (1, 101), "r-2": (2,), "r-3": (5000,)}  # the last one names nothing that was trained on
SAMPLES = {toy.sample(number) for number in (1, 2, 101)}
AT_ONCE, BY_TIME = "its Workflow is gone", "nobody can be asked"


@pytest.fixture
def new_line(monkeypatch):
    """A line with waiting requests; what is known about the holder `run-1` is `line.life`."""

    def make():
        store = MemoryFiles()
        store.now, store.life = datetime.now(UTC), Life.UNKNOWN
        monkeypatch.setattr(heartbeat, "life_of", lambda lease: store.life if lease.holder == "run-1" else Life.UNKNOWN)
        toy.begin(store)
        context = toy.sweep_context(store, lambda: store.now)
        for name, numbers in REQUESTS.items():
            context.ledger.submit(name, LINE, toy.target(*numbers))
        store.written = 0
        return store, context

    return make


def sweep(context, run, poison=frozenset()):
    claimed = toy.claim_next(context, run, lease_seconds=LEASE_SECONDS)
    if claimed.skipped is Skipped.LINE_HELD:
        return claimed
    if claimed.record:
        with heartbeat.lease_renewed(context.store, LINE, run):
            toy.erase(context, claimed.record, poison)
    settle(context, LINE, run)
    return claimed


def pass_on(store, how):
    """Let the time pass, or the news come, after which a dead run must not block its line."""
    if how == AT_ONCE:
        store.life = Life.DEAD
    else:
        store.now += timedelta(minutes=15)


def finish(context):
    """Sweep until nothing waits; a run that was fenced by another costs one more sweep."""
    for number in range(3, 7):
        assert sweep(context, f"run-{number}").skipped is not Skipped.LINE_HELD
        if {context.ledger.status(name) for name in REQUESTS} == {Status.COMPLETED}:
            return
    pytest.fail("a request is left")


def check(context):
    store = context.store
    for name in REQUESTS:
        events = [event.to_status for event in context.ledger.events(name)]
        assert (events[-1], events.count(Status.COMPLETED)) == (Status.COMPLETED, 1), (name, events)
        assert store.get(certificate_key(name)) is not None
    assert toy.forgotten(store, toy.head(store)) == SAMPLES
    assert sum(version.manifest.forget_count for version in ancestry(store, LINE)) == len(SAMPLES)
    assert not list(store.list("scratch/"))
    assert holder_of(store, LINE) is None
    settled = store.objects.copy()
    late = settle(context, LINE, "run-1")  # the exit handler, hours later
    assert late == settle(context, LINE, "run-1")
    changed = {key for key in settled if settled[key] != store.objects.get(key)} | (set(store.objects) - set(settled))
    assert not {key for key in changed if not key.startswith("runs/run-1/events/")}  # its log may get its end now


def writes_of_a_sweep(new_line, poison=frozenset()):
    store, context = new_line()
    sweep(context, "run-1", poison)
    return store.written


@pytest.mark.parametrize("poison", [frozenset(), frozenset({toy.sample(2)})], ids=["published", "refused"])
@pytest.mark.parametrize("how", [AT_ONCE, BY_TIME])
def test_a_run_that_is_killed_before_any_of_its_writes_blocks_its_line_for_minutes_at_most(new_line, how, poison):
    trials = writes_of_a_sweep(new_line, poison)
    assert trials > 30
    for number in range(trials):
        store, context = new_line()
        store.writes_left = number
        with pytest.raises(Killed):
            sweep(context, "run-1", poison)
        store.writes_left = None
        pass_on(store, how)
        assert sweep(context, "run-2").skipped is not Skipped.LINE_HELD, number
        finish(context)
        check(context)


@pytest.mark.parametrize("how", [AT_ONCE, BY_TIME])
def test_a_run_that_sleeps_before_any_of_its_writes_does_no_harm_when_it_wakes_up(new_line, how):
    for number in range(writes_of_a_sweep(new_line)):
        store, context = new_line()

        def sleep(at, store=store, context=context, number=number):
            if at == number:
                pass_on(store, how)
                assert sweep(context, "run-2").skipped is not Skipped.LINE_HELD

        store.hook = sleep
        try:
            sweep(context, "run-1")
        except ConflictError:  # what a step reports; then the exit handler settles
            settle(context, LINE, "run-1")
        finish(context)
        check(context)


def test_a_published_run_without_an_exit_handler_is_completed_by_the_next_claim_at_once(new_line):
    store, context = new_line()
    version = publish_only(context)
    assert toy.claim_next(context, "run-2").skipped is Skipped.LINE_HELD
    store.life = Life.DEAD
    claimed = sweep(context, "run-3")
    assert (claimed.record, sorted(claimed.recovered)) == (None, ["r-1", "r-2"])
    last = context.ledger.state("r-1").last
    assert (last.to_status, last.run, toy.head(store).digest) == (Status.COMPLETED, "run-1", version)
    check(context)


def test_it_is_completed_after_the_lease_if_nobody_can_be_asked(new_line):
    store, context = new_line()
    publish_only(context)
    store.now += timedelta(seconds=LEASE_SECONDS)
    assert sweep(context, "run-2").skipped is Skipped.LINE_HELD
    store.now += timedelta(seconds=2)
    assert sorted(sweep(context, "run-3").recovered) == ["r-1", "r-2"]
    check(context)


def publish_only(context):
    """What a run does whose exit handler never runs: it publishes, and keeps the line."""
    claimed = toy.claim_next(context, "run-1", lease_seconds=LEASE_SECONDS)
    version = toy.erase(context, claimed.record)
    assert holder_of(context.store, LINE) == "run-1"
    return version


def test_a_retry_of_settled_steps_changes_nothing_and_says_what_to_do(new_line):
    store, context = new_line()
    claimed = toy.claim_next(context, "run-1")
    settle(context, LINE, "run-1")  # it failed, and its exit handler ran
    before = store.objects.copy()
    for step in (
        lambda: toy.claim_next(context, "run-1"),
        lambda: toy.erase_late(context, claimed.record),
        lambda: heartbeat.lease_renewed(store, LINE, "run-1").__enter__(),
    ):
        with pytest.raises(RunSettledError, match="this run was settled; submit a new sweep"):
            step()
    assert settle(context, LINE, "run-1").status == "failed"
    lease = f"leases/{LINE}.json"
    assert {key: value for key, value in store.objects.items() if key != lease} == {
        key: value for key, value in before.items() if key != lease
    }
    assert holder_of(store, LINE) is None
    finish(context)
    check(context)


def test_no_thread_outlives_a_sweep(new_line):
    before = set(threading.enumerate())
    _, context = new_line()
    sweep(context, "run-1")
    assert set(threading.enumerate()) <= before
