"""When a batch is due, and what happens to the requests of a run that erased nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.methods.recipe import Recipe
from salun_core.sweeps.policy import (
    Limits,
    SweepPolicy,
    after_failure,
    after_interruption,
    after_refusal,
    due_when,
    why_due,
)

NOW = datetime(2028, 2, 20, 12, tzinfo=UTC)
LIMITS = Limits(recipes=3, attempts=10)
POLICY = SweepPolicy(recipes=[Recipe(method="salun"), Recipe(method="salun", density=0.75), Recipe(method="retrain")])


def hours(*ages):
    return [NOW - timedelta(hours=age) for age in ages]


@pytest.mark.parametrize(
    ("ages", "returned", "reason"),
    [
        ([], 0, None),
        ([1], 0, None),
        ([1] * 15, 0, None),
        ([1] * 16, 0, "16 waiting"),
        ([24], 0, None),
        ([24.1, 1], 0, "more than 24 hours"),
        ([1], 1, "came back"),
    ],
)
def test_a_batch_is_due_by_size_age_or_return(ages, returned, reason):
    found = why_due(hours(*ages), returned, NOW, POLICY)
    assert (found is None) if reason is None else reason in found


@given(st.lists(st.floats(0, 24 * 40), max_size=POLICY.min_requests - 1), st.sampled_from([1.0, 24.0, 2000.0]))
def test_the_time_at_which_a_batch_is_due_is_the_time_at_which_it_becomes_due(ages, wait):
    received, policy = hours(*ages), POLICY.model_copy(update={"max_wait_hours": wait})
    when = due_when(received, policy)
    if when is None:
        assert not received
        return
    assert why_due(received, 0, when - timedelta(seconds=1), policy) is None
    assert why_due(received, 0, when + timedelta(seconds=1), policy)


def test_a_batch_is_due_when_a_month_ends_soon():
    patient = POLICY.model_copy(update={"max_wait_hours": 10_000})
    received = datetime(2028, 1, 31, 9, tzinfo=UTC)  # due on 29 February 2028
    eight_days_before = datetime(2028, 2, 21, 9, tzinfo=UTC)
    assert why_due([received], 0, eight_days_before, patient) is None
    assert "month ends" in why_due([received], 0, eight_days_before + timedelta(seconds=1), patient)


def test_a_refused_batch_is_halved_and_escalated():
    plan = after_refusal({"a": 1, "b": 1, "c": 2}, "run-1", 0, LIMITS)
    assert {name: (step.group, step.level, step.give_up) for name, step in plan.items()} == {
        "a": ("run-1-a", 1, False),
        "b": ("run-1-a", 1, False),
        "c": ("run-1-b", 1, False),
    }


def test_a_request_refused_alone_by_the_last_recipe_fails():
    (step,) = after_refusal({"a": 3}, "run-1", 2, LIMITS).values()
    assert step.give_up
    assert "last of 3 recipes" in step.reason
    several = after_refusal({"a": 3, "b": 3}, "run-1", 2, LIMITS)
    assert {(step.level, step.give_up) for step in several.values()} == {(2, False)}


def test_a_failed_run_is_halved_from_its_second_failure():
    first = after_failure({"a": 1, "b": 1}, "run-1", 1, "half", LIMITS)
    assert {(step.group, step.level) for step in first.values()} == {("half", 1)}
    second = after_failure({"a": 2, "b": 2}, "run-2", 1, "half", LIMITS)
    assert [step.group for step in second.values()] == ["run-2-a", "run-2-b"]


def test_requests_of_a_stale_run_are_queued_unchanged():
    (step,) = after_interruption({"a": 1}, 1, "half", "published meanwhile", LIMITS).values()
    assert (step.group, step.level, step.give_up) == ("half", 1, False)


@given(st.integers(1, 64), st.integers(0, 2), st.integers(1, 9))
def test_halving_keeps_every_request_and_ends(size, level, attempt):
    """Every group gets smaller or escalates, so each request is erased or ends alone after a limited number of runs."""
    members = {f"r-{number}": attempt for number in range(size)}
    plan = after_refusal(members, "run-1", level, LIMITS)
    assert set(plan) == set(members)
    groups: dict[str, int] = {}
    for step in plan.values():
        assert step.give_up == (size == 1 and level == 2)
        groups[step.group] = groups.get(step.group, 0) + 1
        assert step.level >= level
    assert all(count < size or (count == size == 1) for count in groups.values())


def test_attempts_are_limited_for_every_end_of_a_run():
    for plan in (
        after_refusal({"a": 10}, "run-1", 0, LIMITS),
        after_failure({"a": 10}, "run-1", 0, None, LIMITS),
        after_interruption({"a": 10}, 0, None, "published meanwhile", LIMITS),
    ):
        (step,) = plan.values()
        assert step.give_up
        assert "10 attempts are used up" in step.reason
