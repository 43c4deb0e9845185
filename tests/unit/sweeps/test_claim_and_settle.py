"""Claiming and settling on a toy line: batches, escalation, bisection, failed requests and killed runs."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from salun_core.data.targets import ClassTarget
from salun_core.errors import ConflictError, RunSettledError
from salun_core.gate import DECISION, Assurance, Cause, decide, load_policy
from salun_core.methods.recipe import Recipe
from salun_core.requests.ledger import Transition
from salun_core.requests.schema import Outcome, Review, Status, Tried
from salun_core.storage.keys import certificate_key, run_event_key, run_key, scratch_prefix
from salun_core.storage.leases import holder_of
from salun_core.sweeps.claim import Skipped
from salun_core.sweeps.settle import settle
from salun_core.times import utc_clock
from tests.support import toy_line as toy
from tests.support.decisions import refused
from tests.unit.test_refusal import evidence

LINE = toy.LINE


@pytest.fixture
def context(store):
    toy.begin(store)
    return toy.sweep_context(store)


@pytest.fixture
def lease_ended(context, memory_s3):
    """Moves the server's clock past the end of a lease of a second."""

    def wait():
        assert holder_of(context.store, LINE) is not None
        memory_s3.ahead += timedelta(seconds=5)
        assert holder_of(context.store, LINE) is None

    return wait


def submit(context, *numbers, name=None, received=None):
    request = name or f"r-{'-'.join(map(str, numbers))}"
    context.ledger.submit(request, LINE, toy.target(*numbers), received)
    return request


def run_once(context, run, poison=frozenset(), at_last=False, **settings):
    claimed = toy.claim_next(context, run, **settings)
    if claimed.record:
        toy.erase(context, claimed.record, poison, at_last)
    return claimed, settle(context, LINE, run)


def statuses(context, *requests):
    return [context.ledger.status(request) for request in requests]


def test_one_batch_erases_and_certifies_all_waiting_requests(context):
    requests = [submit(context, number, number + 100) for number in range(3)]
    claimed, settled = run_once(context, "run-1")
    assert [member.id for member in claimed.record.members] == requests
    assert statuses(context, *requests) == [Status.COMPLETED] * 3
    assert toy.forgotten(context.store, toy.head(context.store)) == {toy.sample(n) for n in (0, 1, 2, 100, 101, 102)}
    for request in requests:
        last = context.ledger.state(request).last
        assert (last.outcome, last.run, last.epoch) == (Outcome.UNLEARNED, "run-1", 1)
        assert last.assurance == Assurance(level="procedure", margin=0.1, n=6, power=0.25, requests=3)
        certificate = json.loads(context.store.get(certificate_key(request)).data)
        assert certificate["version"] == settled.version == toy.head(context.store).digest
        assert "sample-" not in context.store.get(f"requests/{request}/request.json").data.decode()
    assert not list(context.store.list(scratch_prefix("run-1")))
    assert holder_of(context.store, LINE) is None


def test_nothing_to_erase_is_its_own_outcome(context):
    unknown, known = submit(context, 5000), submit(context, 1)
    claimed, _ = run_once(context, "run-1")
    assert list(claimed.nothing_to_erase) == [unknown]
    assert context.ledger.state(unknown).last.outcome is Outcome.NOTHING_TO_ERASE
    assert context.ledger.state(unknown).last.assurance == Assurance(level="nothing_to_erase")
    assert statuses(context, known) == [Status.COMPLETED]
    again = submit(context, 1, name="again")
    claimed, _ = run_once(context, "run-2")
    assert claimed.record is None
    assert list(claimed.nothing_to_erase) == [again]
    assert holder_of(context.store, LINE) is None


def test_an_unresolvable_request_fails_and_does_not_delay_others(context):
    good = submit(context, 1)
    context.ledger.submit("bad", LINE, ClassTarget(class_id=3))
    claimed, _ = run_once(context, "run-1")
    assert statuses(context, good, "bad") == [Status.COMPLETED, Status.FAILED]
    assert list(claimed.refused) == ["bad"]


def test_a_refused_batch_is_halved_until_the_poison_request_is_alone(context):
    requests = [submit(context, number) for number in range(8)]
    poison = frozenset({toy.sample(5)})
    runs = 0
    while any(context.ledger.entries(Status.QUEUED, LINE)):
        runs += 1
        assert runs < 20
        run_once(context, f"run-{runs}", poison)
    ended = statuses(context, *requests)
    assert ended[5] is Status.FAILED
    assert ended[:5] + ended[6:] == [Status.COMPLETED] * 7
    assert runs <= 8
    assert "gate refused it alone" in context.ledger.state(requests[5]).last.reason
    assert toy.sample(5) not in toy.forgotten(context.store, toy.head(context.store))
    rungs = [event.rung for event in context.ledger.events(requests[5]) if event.to_status is Status.QUEUED]
    assert rungs == sorted(rungs)
    assert max(rungs) == len(toy.RECIPES) - 1


def test_the_last_recipe_retrains(context):
    request = submit(context, 5)
    for number in range(3):
        run_once(context, f"run-{number}", frozenset({toy.sample(5)}), at_last=True)
    last = context.ledger.state(request).last
    assert (last.to_status, last.outcome, last.attempt) == (Status.COMPLETED, Outcome.RETRAINED, 3)


def test_a_retry_does_not_repeat_refused_work(context):
    request = submit(context, 5)
    poison = frozenset({toy.sample(5)})
    for number in range(3):
        run_once(context, f"run-{number}", poison)
    assert statuses(context, request) == [Status.FAILED]
    context.ledger.retry(request, "ana", "try again")
    claimed, _ = run_once(context, "run-3", poison, at_last=True)
    assert claimed.record.rung == len(toy.RECIPES) - 1  # the others were refused for this parent and forget set
    assert statuses(context, request) == [Status.COMPLETED]


def test_a_batch_waits_for_more_requests_but_not_too_long(context):
    young = submit(context, 1)
    claimed, _ = run_once(context, "run-1", min_requests=3)
    assert (claimed.record, statuses(context, young)) == (None, [Status.QUEUED])
    submit(context, 2, received=utc_clock() - timedelta(hours=25))
    claimed, _ = run_once(context, "run-2", min_requests=3)
    assert len(claimed.record.members) == 2
    submit(context, 3, received=utc_clock() - timedelta(days=25))
    claimed, _ = run_once(context, "run-3", min_requests=3, max_wait_hours=8784)
    assert "month ends" in claimed.reason


def test_a_run_forgets_a_limited_share(context):
    earlier = utc_clock() - timedelta(minutes=1)  # the index counts whole seconds
    many = [
        submit(context, *range(start, start + 60), name=f"many-{start}", received=earlier) for start in (0, 100, 200)
    ]
    claimed, _ = run_once(context, "run-1", max_forget_fraction=0.13)
    assert (len(claimed.record.members), claimed.record.forget_count) == (2, 120)
    assert statuses(context, *many) == [Status.COMPLETED, Status.COMPLETED, Status.QUEUED]
    huge = submit(context, *range(300, 600), name="huge")
    run_once(context, "run-2", max_forget_fraction=0.13)
    claimed, _ = run_once(context, "run-3", max_forget_fraction=0.13)
    assert [member.id for member in claimed.record.members] == [huge]
    assert claimed.record.method == "retrain"


def test_all_of_the_training_data_is_never_forgotten(context):
    everything = submit(context, *range(toy.SAMPLES), name="everything")
    claimed, _ = run_once(context, "run-1")
    assert (claimed.record, statuses(context, everything)) == (None, [Status.FAILED])


def test_a_leased_line_is_not_claimed(context):
    submit(context, 1)
    toy.claim_next(context, "run-1")
    other = toy.claim_next(context, "run-2")
    assert (other.record, other.skipped, other.due) == (None, Skipped.LINE_HELD, 0)
    assert other.reason.startswith("line held by run-1: ")
    assert settle(context, LINE, "run-2").status is None
    assert holder_of(context.store, LINE) == "run-1"


def test_a_claim_of_nothing_says_why_and_how_much_is_due(context):
    assert toy.claim_next(context, "run-1").skipped is Skipped.NO_REQUESTS
    submit(context, 1)
    early = toy.claim_next(context, "run-1", min_requests=3)
    assert (early.skipped, early.due) == (Skipped.NOT_DUE, 0)
    submit(context, 2)
    held = toy.claim_next(context, "run-2", min_requests=2)
    assert (held.skipped, held.due) == (Skipped.LINE_HELD, 2)
    assert toy.claim_next(context, "run-2", min_requests=3).due == 0  # of what waits nothing is due
    settle(context, LINE, "run-1")
    full = toy.claim_next(context, "run-2")
    assert (full.requests, full.skipped, full.due) == (2, None, 0)


def test_a_claim_that_completed_all_that_was_due_skipped_nothing(context):
    submit(context, 5000)
    assert toy.claim_next(context, "run-1").skipped is None


def test_a_run_that_has_ended_claims_nothing_and_holds_nothing(context):
    submit(context, 1)
    run_once(context, "run-1")
    with pytest.raises(RunSettledError, match="run run-1 has ended: it is published.*submit a new sweep"):
        toy.claim_next(context, "run-1")
    assert holder_of(context.store, LINE) is None


def test_repeating_a_claim_gives_the_same_batch(context):
    requests = [submit(context, 1), submit(context, 2)]
    first = toy.claim_next(context, "run-1")
    second = toy.claim_next(context, "run-1")
    assert second.record == first.record
    assert statuses(context, *requests) == [Status.IN_PROGRESS] * 2


def test_a_run_without_a_verdict_is_queued_again_and_a_dead_run_is_recovered(context, lease_ended):
    request = submit(context, 1)
    toy.claim_next(context, "run-1", lease_seconds=1)
    settled = settle(context, LINE, "run-1")
    assert (settled.status, settled.queued) == ("failed", [request])
    toy.claim_next(context, "run-2", lease_seconds=1)
    lease_ended()
    claimed, _ = run_once(context, "run-3")
    assert list(claimed.recovered) == [request]
    assert context.ledger.state(request).last.attempt == 3
    assert statuses(context, request) == [Status.COMPLETED]


def test_the_next_sweep_completes_a_run_that_published_and_died(context, lease_ended):
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1", lease_seconds=1)
    version = toy.erase(context, claimed.record)
    lease_ended()
    after, _ = run_once(context, "run-2")
    assert (after.record, list(after.recovered)) == (None, [request])
    last = context.ledger.state(request).last
    assert (last.to_status, last.run, last.outcome) == (Status.COMPLETED, "run-1", Outcome.UNLEARNED)
    assert toy.head(context.store).digest == version


def test_the_log_of_a_settled_run_refuses_its_late_publish(context):
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1")
    settle(context, LINE, "run-1")
    with pytest.raises(ConflictError, match="has ended"):
        toy.erase_late(context, claimed.record)
    assert statuses(context, request) == [Status.QUEUED]


def test_the_next_claim_finds_a_late_publish(context):
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1")
    settle(context, LINE, "run-1")
    gone = toy.forgotten(context.store, toy.head(context.store)) | {toy.sample(1)}
    version = toy.publish(context.store, LINE, claimed.record.parent, gone, "run-1", 1)
    after, _ = run_once(context, "run-2")
    last = context.ledger.state(request).last
    assert after.record is None
    assert (last.outcome, last.to_status) == (Outcome.UNLEARNED, Status.COMPLETED)
    assert json.loads(context.store.get(certificate_key(request)).data)["version"] == version


def test_a_version_that_forgot_another_set_certifies_nothing_and_blocks_nothing(context, lease_ended):
    """Somebody replaced the frozen forget set of a run that died after HEAD had moved."""
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1", lease_seconds=1)
    gone = {toy.sample(7)}
    toy.publish(context.store, LINE, claimed.record.parent, gone, "run-1", 1, forget_set_digest="0" * 64)
    lease_ended()
    other = submit(context, 2)
    after, settled = run_once(context, "run-2")
    assert list(after.recovered) == [request]
    assert sorted(settled.completed) == sorted([request, other])
    assert toy.forgotten(context.store, toy.head(context.store)) == {toy.sample(7), toy.sample(1), toy.sample(2)}
    assert context.ledger.state(request).last.run == "run-2"


def test_requests_of_a_stale_run_are_queued_unchanged(context):
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1")
    toy.publish(context.store, LINE, claimed.record.parent, {toy.sample(9)}, None, 1)
    with pytest.raises(ConflictError, match="stale parent"):
        toy.erase(context, claimed.record)
    settled = settle(context, LINE, "run-1")
    last = context.ledger.state(request).last
    assert (settled.status, last.rung, last.attempt) == ("stale_parent", 0, 2)
    run_once(context, "run-2")
    assert toy.forgotten(context.store, toy.head(context.store)) == {toy.sample(1), toy.sample(9)}


def test_attempts_are_limited(context):
    request = submit(context, 1)
    for number in range(3):
        toy.claim_next(context, f"run-{number}", max_attempts=3)
        settle(context, LINE, f"run-{number}")
    last = context.ledger.state(request).last
    assert (last.to_status, last.attempt) == (Status.FAILED, 3)
    assert "attempts are used up" in last.reason


def test_settling_twice_reports_the_status_of_the_log_and_the_same_requests(context):
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1")
    first = settle(context, LINE, "run-1")
    assert (first.status, first.queued) == ("failed", [request])
    toy.publish(context.store, LINE, claimed.record.parent, {toy.sample(9)}, None, 1)
    assert settle(context, LINE, "run-1") == first  # HEAD is another now, but the run did not end by that
    _, done = run_once(context, "run-2")
    assert (done.status, done.completed) == ("published", [request])
    toy.publish(context.store, LINE, done.version, {toy.sample(1), toy.sample(9), toy.sample(8)}, None, 1)
    assert settle(context, LINE, "run-2") == done
    assert settle(context, LINE, "run-1") == replace(first, queued=[])  # the request went its way


def test_the_escalation_of_a_run_is_that_of_its_record(context):
    """The sweep that settles may have other recipes: then the run's own decide what its last one is."""
    request = submit(context, 5)
    claimed = toy.claim_next(context, "run-1", recipes=toy.RECIPES[:1])
    toy.erase(context, claimed.record, frozenset({toy.sample(5)}))
    assert settle(context, LINE, "run-1").failed == [request]


BY_CAUSE = {
    "recipes": toy.RECIPES,
    "gentler": [Recipe(method="salun", density=0.4), Recipe(method="salun", density=0.3)],
    "others": [Recipe(method="sfr_on")],
}


def refuse(context, run, *causes, **settings):
    """Claim for a run, and leave the gate's decision as its step does before anything settles the run."""
    claimed = toy.claim_next(context, run, **{**BY_CAUSE, **settings})
    context.store.put_new(run_key(run, DECISION), refused(*causes).model_dump_json().encode())
    return claimed.record


def test_the_cause_of_a_refusal_decides_the_next_recipe(context):
    request = submit(context, 5)
    refuse(context, "run-1", "damaged")
    settled = settle(context, LINE, "run-1")
    last = context.ledger.state(request).last
    assert (last.to_status, last.rung, last.tried) == (Status.QUEUED, 3, [Tried(rung=0, causes=["damaged"])])
    assert last.reason == settled.next
    assert settled.next == "the gate refused the run (damaged); next: a gentler recipe (salun, density 0.4)"
    assert settle(context, LINE, "run-1") == settled
    record = refuse(context, "run-2", "not_forgotten")
    assert (record.rung, record.density) == (3, 0.4)
    settle(context, LINE, "run-2")
    record = refuse(context, "run-3", "damaged")  # no strength lies between 0.4 and 0.5
    assert (record.method, [item.rung for item in record.tried]) == ("sfr_on", [0, 3])
    settle(context, LINE, "run-3")
    claimed, _ = run_once(context, "run-4", **BY_CAUSE)
    assert claimed.record.method == "retrain"
    assert context.ledger.state(request).last.outcome is Outcome.RETRAINED


def test_a_run_that_is_killed_after_the_refusal_is_settled_by_its_cause(context, lease_ended):
    request = submit(context, 5)
    refuse(context, "run-1", "over_forgotten", lease_seconds=1)
    lease_ended()
    claimed = toy.claim_next(context, "run-2", **BY_CAUSE)  # it settles run-1 first, and has another configuration
    assert (list(claimed.recovered), claimed.record.rung, claimed.record.density) == ([request], 3, 0.4)


def test_equal_work_is_not_repeated_and_its_causes_are_kept(context):
    first = submit(context, 5)
    refuse(context, "run-1", "damaged")
    settle(context, LINE, "run-1")
    context.ledger.cancel(first, "ana", "withdrawn")
    submit(context, 5, name="again")
    record = toy.claim_next(context, "run-2", **BY_CAUSE).record
    assert (record.rung, record.tried) == (3, [Tried(rung=0, causes=["damaged"])])


@pytest.mark.parametrize("cause", ["too_few_samples", "not_measured", "integrity"])
def test_a_cause_that_no_recipe_changes_holds_the_requests(context, cause):
    requests = [submit(context, 5), submit(context, 6)]
    refuse(context, "run-1", cause)
    settled = settle(context, LINE, "run-1")
    assert (settled.held, settled.queued, settled.failed) == (requests, [], [])
    assert settle(context, LINE, "run-1") == settled
    last = context.ledger.state(requests[0]).last
    assert (last.to_status, last.outcome, last.run) == (Status.ON_HOLD, Review(cause), "run-1")
    assert "held for review" in last.reason
    assert last.reason.endswith(f"next: mend {cause}")
    for request in requests:
        context.ledger.release(request, "ana", "mended")
    claimed, _ = run_once(context, "run-2", **BY_CAUSE)
    assert (claimed.record.rung, claimed.record.tried) == (0, None)  # the same recipe: it was not at fault
    assert statuses(context, *requests) == [Status.COMPLETED] * 2


def test_a_settle_that_died_between_the_two_events_of_a_held_request_is_completed(context):
    request = submit(context, 5)
    refuse(context, "run-1", "not_measured")
    context.ledger.move(request, Transition(Status.QUEUED, "sweep", "it dies here", "run-1"))
    settled = settle(context, LINE, "run-1")
    assert (list(settled.held), list(settled.queued)) == ([request], [])
    assert statuses(context, request) == [Status.ON_HOLD]


def test_weights_that_are_not_finite_are_damage_although_nothing_can_be_measured(context):
    request = submit(context, 5)
    broken = evidence(integrity={"non_finite": 3}, RA=None)
    toy.claim_next(context, "run-1", **BY_CAUSE)
    decision = decide(broken, load_policy("classifier"))
    assert Cause.NOT_MEASURED in {refusal.cause for refusal in decision.refusals}
    context.store.put_new(run_key("run-1", DECISION), decision.model_dump_json().encode())
    assert list(settle(context, LINE, "run-1").queued) == [request]
    assert context.ledger.state(request).last.tried == [Tried(rung=0, causes=["damaged"])]


def test_a_refusal_without_a_decision_leads_to_the_stronger_recipe(context):
    request = submit(context, 5)
    claimed = toy.claim_next(context, "run-1", **BY_CAUSE)
    toy.erase(context, claimed.record, frozenset({toy.sample(5)}))
    settle(context, LINE, "run-1")
    last = context.ledger.state(request).last
    assert (last.rung, last.tried) == (1, [Tried(rung=0, causes=[])])


def test_a_damaged_log_does_not_keep_requests_in_progress(context):
    request = submit(context, 1)
    claimed = toy.claim_next(context, "run-1")
    version = toy.erase(context, claimed.record)
    context.store.delete(run_event_key("run-1", 2))
    settled = settle(context, LINE, "run-1")
    assert (settled.status, settled.version, settled.completed) == ("published", version, [request])


def test_a_held_request_is_not_claimed(context):
    held, free = submit(context, 1), submit(context, 2)
    context.ledger.hold(held, "ana", "identity in doubt")
    run_once(context, "run-1")
    assert statuses(context, held, free) == [Status.ON_HOLD, Status.COMPLETED]
