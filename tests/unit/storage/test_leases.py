"""Leases: who may take one, when, and what a holder that lost its lease is told."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from salun_core.errors import ConflictError, LineHeldError, RunSettledError
from salun_core.storage.keys import lease_key
from salun_core.storage.leases import Life, Place, acquire, holder_of, read_lease, release, renew
from tests.support.memory_store import MemoryStore

LINE, SECONDS = "faces", 600
PLACE = Place(namespace="salun", workflow="sweep-x7k2p", cluster="c" * 64)


@pytest.fixture
def store():
    return MemoryStore()


def later(store, seconds):
    store.now += timedelta(seconds=seconds)


def take(store, run, life=Life.UNKNOWN, place=None):
    return acquire(store, LINE, run, SECONDS, place, lambda lease: life)


@pytest.mark.parametrize(
    ("silence", "life", "taken"),
    [
        (0, Life.DEAD, True),
        (0, Life.UNKNOWN, False),
        (0, Life.ALIVE, False),
        (SECONDS, Life.UNKNOWN, False),
        (SECONDS + 2, Life.UNKNOWN, True),
        (SECONDS + 2, Life.DEAD, True),
        (SECONDS + 2, Life.ALIVE, False),
        (7 * 86400, Life.ALIVE, False),
    ],
)
def test_a_dead_holder_loses_the_line_at_once_a_late_one_unless_it_lives(store, silence, life, taken):
    first = take(store, "run-1")
    later(store, silence)
    if taken:
        second = take(store, "run-2", life)
        assert (second.holder, second.epoch) == ("run-2", first.epoch + 1)
    else:
        with pytest.raises(LineHeldError, match=f"line held by run-1: .* renewed its lease {silence} s ago"):
            take(store, "run-2", life)
        assert read_lease(store, LINE) == first


def test_a_lease_names_the_run_that_it_was_taken_from(store):
    assert take(store, "run-1").taken_from is None
    assert take(store, "run-2", Life.DEAD).taken_from == "run-1"
    assert take(store, "run-2").taken_from == "run-1"  # the step is repeated
    release(store, LINE, "run-2")
    assert take(store, "run-3").taken_from is None


def test_a_free_line_needs_no_question(store):
    def ask(lease):
        raise AssertionError(f"asked about {lease.holder}")

    acquire(store, LINE, "run-1", SECONDS, None, ask)
    acquire(store, LINE, "run-1", SECONDS, None, ask)  # its own
    release(store, LINE, "run-1")
    assert acquire(store, LINE, "run-2", SECONDS, None, ask).epoch == 2


def test_the_life_of_the_present_holder_is_what_is_asked_for(store):
    take(store, "run-1", place=PLACE)
    asked = []
    with pytest.raises(LineHeldError):
        acquire(store, LINE, "run-2", SECONDS, None, lambda lease: asked.append(lease) or Life.ALIVE)
    assert [(lease.holder, lease.place) for lease in asked] == [("run-1", PLACE)]


def test_a_holder_that_renews_while_it_is_declared_dead_keeps_the_line(store):
    lease, asked = take(store, "run-1"), []

    def life(found):
        asked.append(found.beat)
        if len(asked) == 1:
            renew(store, lease)
            return Life.DEAD  # the answer is older than the beat
        return Life.UNKNOWN

    with pytest.raises(LineHeldError, match="line held by run-1"):
        acquire(store, LINE, "run-2", SECONDS, None, life)
    assert (asked, holder_of(store, LINE)) == ([1, 2], "run-1")


def test_of_two_that_take_a_free_line_at_once_the_later_one_is_told_who_was_faster(store):
    take(store, "run-0")
    real = store.put_if

    def put_if(key, data, etag):
        store.put_if = real
        take(store, "run-1", Life.DEAD)
        return real(key, data, etag)

    store.put_if = put_if
    answers = iter([Life.DEAD, Life.UNKNOWN])
    with pytest.raises(LineHeldError, match="line held by run-1"):
        acquire(store, LINE, "run-2", SECONDS, None, lambda lease: next(answers))


def test_a_late_holder_renews_as_long_as_nobody_took_the_line(store):
    lease = take(store, "run-1")
    later(store, 3 * SECONDS)
    assert holder_of(store, LINE) is None
    renew(store, lease)
    assert holder_of(store, LINE) == "run-1"


def test_a_holder_that_lost_the_line_is_told_to_submit_again(store):
    lease = take(store, "run-1")
    take(store, "run-2", Life.DEAD)
    with pytest.raises(RunSettledError, match="run run-2 took the line over.*submit a new sweep") as told:
        renew(store, lease)
    assert (told.value.exit_code, isinstance(told.value, ConflictError)) == (4, True)
    assert not release(store, LINE, "run-1")
    assert holder_of(store, LINE) == "run-2"


def test_a_run_that_gave_the_line_back_cannot_renew(store):
    lease = take(store, "run-1")
    assert release(store, LINE, "run-1")
    assert not release(store, LINE, "run-1")
    with pytest.raises(RunSettledError, match="given back when the run was settled"):
        renew(store, lease)


@pytest.mark.parametrize("act", [renew, lambda store, lease: release(store, LINE, lease.holder)])
def test_a_twin_that_renews_meanwhile_is_no_rival(store, act):
    lease = take(store, "run-1")
    real = store.put_if

    def put_if(key, data, etag):
        store.put_if = real
        renew(store, lease)
        return real(key, data, etag)

    store.put_if = put_if
    assert act(store, lease)
    assert (read_lease(store, LINE).holder, read_lease(store, LINE).beat) == ("run-1", 3)


def test_a_lease_without_a_place_does_not_mention_one(store):
    take(store, "run-1")
    fields = {"format", "line", "holder", "epoch", "beat", "seconds", "released"}
    assert set(json.loads(store.get(lease_key(LINE)).data)) == fields
    release(store, LINE, "run-1")
    take(store, "run-2", place=PLACE)
    assert read_lease(store, LINE).place == PLACE
