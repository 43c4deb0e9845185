"""A line is held, renewed while a block runs, and given back."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from salun_core.errors import LineHeldError, RunSettledError, StoreError
from salun_core.storage.leases import holder_of, read_lease, release
from salun_core.sweeps.heartbeat import hold_line, lease_renewed, line_held
from tests.support.memory_store import MemoryStore

LINE = "faces"


@pytest.fixture
def store():
    return MemoryStore()


def beats(store):
    return read_lease(store, LINE).beat


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_late_lease_is_renewed_at_once_and_then_every_third_of_it(store):
    hold_line(store, LINE, "run-1", 60)
    store.now += timedelta(seconds=3600)
    with lease_renewed(store, LINE, "run-1", 1):
        assert (beats(store), holder_of(store, LINE)) == (2, "run-1")
        begin = time.monotonic()
        wait_for(lambda: beats(store) >= 4)
        assert time.monotonic() - begin > 0.5
    ended = beats(store)
    time.sleep(0.5)
    assert beats(store) == ended
    assert read_lease(store, LINE).seconds == 1


def test_a_step_of_a_run_that_was_taken_over_does_not_begin(store):
    hold_line(store, LINE, "run-1", 60)
    store.now += timedelta(seconds=62)
    hold_line(store, LINE, "run-2", 60)
    with (
        pytest.raises(RunSettledError, match="run-2 took the line over.*submit a new sweep"),
        lease_renewed(store, LINE, "run-1", 60),
    ):
        pytest.fail("it began")
    release(store, LINE, "run-2")
    with pytest.raises(RunSettledError), lease_renewed(store, LINE, "run-1", 60):
        pytest.fail("it began")


def test_a_step_of_a_settled_run_does_not_begin(store):
    hold_line(store, LINE, "run-1", 60)
    release(store, LINE, "run-1")
    with pytest.raises(RunSettledError, match="given back"), lease_renewed(store, LINE, "run-1", 60):
        pytest.fail("it began")


def test_a_holder_that_slept_does_not_beat_in_the_lease_of_another(store):
    hold_line(store, LINE, "run-1", 1)
    with lease_renewed(store, LINE, "run-1", 1):
        store.now += timedelta(seconds=3)
        while True:  # its thread may beat in between
            try:
                hold_line(store, LINE, "run-2", 60)
                break
            except LineHeldError:
                store.now += timedelta(seconds=3)
        taken = beats(store)
        time.sleep(1)
        assert beats(store) == taken
    assert holder_of(store, LINE) == "run-2"


def test_a_store_that_is_away_for_a_beat_costs_nothing(store):
    hold_line(store, LINE, "run-1", 60)
    real, failures = store.put_if, []

    def put_if(key, data, etag):
        if len(failures) < 2:
            failures.append(key)
            raise StoreError("no answer", "the network is down", "try again")
        return real(key, data, etag)

    store.put_if = put_if
    with lease_renewed(store, LINE, "run-1", 1):
        wait_for(lambda: beats(store) >= 2)
    assert len(failures) == 2


def test_a_line_is_given_back_however_the_block_ends(store):
    def work():
        with line_held(store, LINE, "run-1"):
            assert holder_of(store, LINE) == "run-1"
            with pytest.raises(LineHeldError, match="line held by run-1"), line_held(store, LINE, "run-2"):
                pytest.fail("two at once")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert holder_of(store, LINE) is None
