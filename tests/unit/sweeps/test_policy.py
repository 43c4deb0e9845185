"""When a batch is due, and what happens to the requests of a run that erased nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.gate import Cause
from salun_core.methods.recipe import Recipe
from salun_core.requests.schema import Review, Tried
from salun_core.sweeps.policy import (
    Limits,
    Refused,
    SweepPolicy,
    after_failure,
    after_interruption,
    after_refusal,
    due_when,
    last_resort,
    next_level,
    why_due,
)

NOW = datetime(2028, 2, 20, 12, tzinfo=UTC)


def salun(**more):
    return Recipe(method="salun", **more)


POLICY = SweepPolicy(recipes=[salun(), salun(density=0.75), Recipe(method="retrain")])
LIMITS = Limits(POLICY.levels, attempts=10)
NO_CAUSE = Refused()  # the decision is missing


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
    plan = after_refusal({"a": 1, "b": 1, "c": 2}, "run-1", 0, LIMITS, NO_CAUSE)
    assert {name: (step.group, step.level, step.give_up) for name, step in plan.items()} == {
        "a": ("run-1-a", 1, False),
        "b": ("run-1-a", 1, False),
        "c": ("run-1-b", 1, False),
    }


def test_a_request_refused_alone_by_the_last_recipe_fails():
    (step,) = after_refusal({"a": 3}, "run-1", 2, LIMITS, NO_CAUSE).values()
    assert step.give_up
    assert step.reason == "the gate refused it alone, and none of 3 recipes is left: a person decides"
    several = after_refusal({"a": 3, "b": 3}, "run-1", 2, LIMITS, NO_CAUSE)
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
    plan = after_refusal(members, "run-1", level, LIMITS, NO_CAUSE)
    assert set(plan) == set(members)
    groups: dict[str, int] = {}
    for step in plan.values():
        assert step.give_up == (size == 1 and level == 2)
        groups[step.group] = groups.get(step.group, 0) + 1
        assert step.level >= level
    assert all(count < size or (count == size == 1) for count in groups.values())


def test_attempts_are_limited_for_every_end_of_a_run():
    for plan in (
        after_refusal({"a": 10}, "run-1", 0, LIMITS, NO_CAUSE),
        after_failure({"a": 10}, "run-1", 0, None, LIMITS),
        after_interruption({"a": 10}, 0, None, "published meanwhile", LIMITS),
    ):
        (step,) = plan.values()
        assert step.give_up
        assert "10 attempts are used up" in step.reason


FORGOT_LITTLE, FORGOT_MUCH, DAMAGED = Cause.NOT_FORGOTTEN, Cause.OVER_FORGOTTEN, Cause.DAMAGED
FEW, UNMEASURED, INTEGRITY = Cause.TOO_FEW_SAMPLES, Cause.NOT_MEASURED, Cause.INTEGRITY
BY_CAUSE = SweepPolicy(
    recipes=[
        salun(),
        salun(density=0.6),
        salun(density=0.7),
        Recipe(method="retrain"),
    ],
    gentler=[salun(density=0.4), salun(density=0.3)],
    others=[Recipe(method="sfr_on")],
)
FIRST, STRONGER, STRONGEST, RETRAIN, GENTLER, GENTLEST, OTHER = range(7)


@pytest.mark.parametrize(
    ("refusals", "expected"),
    [
        ([(FIRST, [FORGOT_LITTLE])], STRONGER),
        ([(FIRST, [FORGOT_LITTLE, FEW])], STRONGER),
        ([(FIRST, [])], STRONGER),
        ([(FIRST, [DAMAGED])], GENTLER),
        ([(FIRST, [FORGOT_MUCH])], GENTLER),
        ([(FIRST, [DAMAGED, FORGOT_MUCH, FEW])], GENTLER),
        ([(FIRST, [DAMAGED, FORGOT_LITTLE])], OTHER),
        ([(FIRST, [FORGOT_MUCH, FORGOT_LITTLE])], OTHER),
        ([(FIRST, [FORGOT_LITTLE]), (STRONGER, [FORGOT_LITTLE])], STRONGEST),
        ([(FIRST, [FORGOT_LITTLE]), (STRONGER, [FORGOT_LITTLE]), (STRONGEST, [FORGOT_LITTLE])], RETRAIN),
        ([(FIRST, [FORGOT_LITTLE]), (STRONGER, [DAMAGED])], OTHER),
        ([(FIRST, [FORGOT_LITTLE]), (STRONGEST, [DAMAGED])], STRONGER),
        ([(FIRST, [DAMAGED]), (GENTLER, [DAMAGED])], GENTLEST),
        ([(FIRST, [DAMAGED]), (GENTLER, [FORGOT_LITTLE])], OTHER),
        ([(FIRST, [DAMAGED]), (GENTLEST, [FORGOT_LITTLE])], GENTLER),
        ([(FIRST, [DAMAGED]), (GENTLER, [DAMAGED]), (GENTLEST, [DAMAGED])], OTHER),
        ([(FIRST, [DAMAGED, FORGOT_LITTLE]), (OTHER, [FORGOT_LITTLE])], RETRAIN),
        ([(FIRST, [DAMAGED, FORGOT_LITTLE]), (OTHER, [DAMAGED]), (RETRAIN, [DAMAGED])], None),
        ([(RETRAIN, [FORGOT_LITTLE])], None),
        ([(FIRST, [DAMAGED]), (99, [FORGOT_LITTLE])], GENTLER),  # a level that the sweep has no more
    ],
)
def test_the_causes_of_all_refusals_decide_the_next_recipe(refusals, expected):
    assert next_level(BY_CAUSE.levels, dict(refusals)) == expected


@pytest.mark.parametrize(
    ("causes", "review"),
    [
        ([FEW], Review.TOO_FEW_SAMPLES),
        ([UNMEASURED], Review.NOT_MEASURED),
        ([UNMEASURED, DAMAGED, FEW], Review.NOT_MEASURED),
        ([INTEGRITY, UNMEASURED, FORGOT_LITTLE], Review.INTEGRITY),
    ],
)
def test_causes_that_no_recipe_changes_hold_all_requests_for_review(causes, review):
    refused = Refused(frozenset(causes), {Cause(review.value): "do this first"})
    plan = after_refusal({"a": 1, "b": 9}, "run-1", FIRST, Limits(BY_CAUSE.levels), refused)
    assert {(step.review, step.level, step.give_up, step.tried) for step in plan.values()} == {
        (review, FIRST, False, None)
    }
    for text in ("held for review", Cause(review.value).words, "next: do this first"):
        assert text in plan["a"].reason


@pytest.mark.parametrize(
    ("level", "causes", "next_step"),
    [
        (FIRST, [FORGOT_LITTLE], "a stronger recipe (salun, density 0.6)"),
        (FIRST, [DAMAGED], "a gentler recipe (salun, density 0.4)"),
        (FIRST, [DAMAGED, FORGOT_LITTLE], "another method (sfr_on)"),
        (STRONGEST, [DAMAGED], "a gentler recipe (salun, density 0.6)"),
        (OTHER, [DAMAGED], "a full retraining (retrain)"),
    ],
)
def test_the_reason_names_the_cause_and_what_comes_next(level, causes, next_step):
    (step,) = after_refusal({"a": 1}, "run-1", level, Limits(BY_CAUSE.levels), Refused(frozenset(causes))).values()
    assert step.reason == f"the gate refused the run ({', '.join(sorted(causes))}); next: {next_step}"
    assert step.tried == [Tried(rung=level, causes=sorted(causes))]


@given(st.lists(st.sets(st.sampled_from([FORGOT_LITTLE, FORGOT_MUCH, DAMAGED]), min_size=1), min_size=10, max_size=10))
def test_no_recipe_is_tried_twice_or_stronger_than_one_that_did_harm(answers):
    levels, tried, level = BY_CAUSE.levels, {}, FIRST
    while level is not None:
        assert level not in tried
        harmed = [levels[n].strength for n, causes in tried.items() if causes & {FORGOT_MUCH, DAMAGED}]
        if levels[level].role == "strength":
            assert all(levels[level].strength < strength for strength in harmed)
        tried[level] = frozenset(answers[len(tried)])
        level = next_level(levels, tried)
    assert RETRAIN in tried


def test_without_a_retraining_harm_ends_with_a_person_and_never_repeats():
    """A diffusion line is not retrained."""
    policy = SweepPolicy(
        recipes=[salun(), salun(density=0.6)],
        gentler=[salun(density=0.4)],
    )
    limits, harm = Limits(policy.levels), Refused(frozenset({DAMAGED}))
    tried = [Tried(rung=0, causes=[DAMAGED])]
    plan = after_refusal({"a": 2, "b": 2}, "run-2", 2, limits, harm, tried)
    assert {step.give_up for step in plan.values()} == {True}
    assert "none of 3 recipes is left: a person decides" in plan["a"].reason
    weak = Refused(frozenset({FORGOT_LITTLE}))
    halves = after_refusal({"a": 2, "b": 2}, "run-2", 1, limits, weak, [Tried(rung=0, causes=[FORGOT_LITTLE])])
    assert [(step.give_up, step.level, step.group) for step in halves.values()] == [
        (False, 1, "run-2-a"),
        (False, 1, "run-2-b"),
    ]
    assert last_resort(policy.levels, {0: [DAMAGED]}) == 2
    assert last_resort(policy.levels, {}) == 1


def test_a_plain_list_of_recipes_keeps_its_order():
    """Ever stronger, then a retraining. Damage skips to the retraining."""
    levels = POLICY.levels
    assert [(level.role.value, level.strength) for level in levels] == [
        ("strength", 0),
        ("strength", 1),
        ("retrain", 0),
    ]
    assert next_level(levels, {0: [FORGOT_LITTLE]}) == 1
    assert next_level(levels, {0: [DAMAGED]}) == 2
    assert next_level(SweepPolicy(recipes=POLICY.recipes[:2]).levels, {0: [DAMAGED]}) is None
