"""Claiming and settling on a toy line: batches, the ladder, bisection, dead letters, what a killed run leaves."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from salun_core.data.forget_set import ClassTarget
from salun_core.errors import ConflictError
from salun_core.requests.schema import Outcome, Status
from salun_core.storage.keys import certificate_key, scratch_prefix
from salun_core.storage.leases import holder_of
from salun_core.sweeps.settle import settle
from salun_core.times import utc_clock
from tests import toy_line as toy

pytestmark = pytest.mark.s3
LINE = toy.LINE


@pytest.fixture
def books(store):
    toy.begin(store)
    return toy.books(store)


def submit(books, *numbers, name=None, received=None):
    request = name or f"r-{'-'.join(map(str, numbers))}"
    books.ledger.submit(request, LINE, toy.target(*numbers), received)
    return request


def run_once(books, run, poison=frozenset(), at_last=False, **settings):
    claimed = toy.claim_next(books, run, **settings)
    if claimed.record:
        toy.erase(books, claimed.record, poison, at_last)
    return claimed, settle(books, LINE, run, toy.terms(**settings))


def statuses(books, *requests):
    return [books.ledger.status(request) for request in requests]


def test_one_batch_erases_all_that_waits_and_certifies_each(books):
    requests = [submit(books, number, number + 100) for number in range(3)]
    claimed, settled = run_once(books, "run-1")
    assert [member.id for member in claimed.record.members] == requests
    assert statuses(books, *requests) == [Status.COMPLETED] * 3
    assert toy.forgotten(books.store, toy.head(books.store)) == {toy.sample(n) for n in (0, 1, 2, 100, 101, 102)}
    for request in requests:
        last = books.ledger.state(request).last
        assert (last.outcome, last.run, last.epoch) == (Outcome.UNLEARNED, "run-1", 1)
        certificate = json.loads(books.store.get(certificate_key(request)).data)
        assert certificate["version"] == settled.version == toy.head(books.store).digest
        assert "sample-" not in books.store.get(f"requests/{request}/request.json").data.decode()
    assert not list(books.store.list(scratch_prefix("run-1")))
    assert holder_of(books.store, LINE) is None


def test_nothing_to_erase_is_an_outcome_of_its_own(books):
    unknown, known = submit(books, 5000), submit(books, 1)
    claimed, _ = run_once(books, "run-1")
    assert list(claimed.nothing_to_erase) == [unknown]
    assert books.ledger.state(unknown).last.outcome is Outcome.NOTHING_TO_ERASE
    assert statuses(books, known) == [Status.COMPLETED]
    again = submit(books, 1, name="again")
    claimed, _ = run_once(books, "run-2")
    assert claimed.record is None
    assert list(claimed.nothing_to_erase) == [again]
    assert holder_of(books.store, LINE) is None


def test_what_cannot_be_resolved_becomes_a_dead_letter_and_holds_nothing_back(books):
    good = submit(books, 1)
    books.ledger.submit("bad", LINE, ClassTarget(class_id=3))
    claimed, _ = run_once(books, "run-1")
    assert statuses(books, good, "bad") == [Status.COMPLETED, Status.FAILED]
    assert list(claimed.refused) == ["bad"]


def test_a_refused_batch_is_halved_until_the_poison_is_alone(books):
    requests = [submit(books, number) for number in range(8)]
    poison = frozenset({toy.sample(5)})
    runs = 0
    while any(books.ledger.standing(Status.QUEUED, LINE)):
        runs += 1
        assert runs < 20
        run_once(books, f"run-{runs}", poison)
    ended = statuses(books, *requests)
    assert ended[5] is Status.FAILED
    assert ended[:5] + ended[6:] == [Status.COMPLETED] * 7
    assert runs <= 8
    assert "gate refused it alone" in books.ledger.state(requests[5]).last.reason
    assert toy.sample(5) not in toy.forgotten(books.store, toy.head(books.store))
    rungs = [event.rung for event in books.ledger.events(requests[5]) if event.to_status is Status.QUEUED]
    assert rungs == sorted(rungs)
    assert max(rungs) == len(toy.LADDER) - 1


def test_the_last_recipe_retrains(books):
    request = submit(books, 5)
    for number in range(3):
        run_once(books, f"run-{number}", frozenset({toy.sample(5)}), at_last=True)
    last = books.ledger.state(request).last
    assert (last.to_status, last.outcome, last.attempt) == (Status.COMPLETED, Outcome.RETRAINED, 3)


def test_a_person_may_retry_and_equal_work_is_not_repeated(books):
    request = submit(books, 5)
    poison = frozenset({toy.sample(5)})
    for number in range(3):
        run_once(books, f"run-{number}", poison)
    assert statuses(books, request) == [Status.FAILED]
    books.ledger.retry(request, "ana", "try again")
    claimed, _ = run_once(books, "run-3", poison, at_last=True)
    assert claimed.record.rung == len(toy.LADDER) - 1  # the others were refused for this very parent and set
    assert statuses(books, request) == [Status.COMPLETED]


def test_a_batch_waits_for_company_but_not_for_ever(books):
    young = submit(books, 1)
    claimed, _ = run_once(books, "run-1", min_requests=3)
    assert (claimed.record, statuses(books, young)) == (None, [Status.QUEUED])
    submit(books, 2, received=utc_clock() - timedelta(hours=25))
    claimed, _ = run_once(books, "run-2", min_requests=3)
    assert len(claimed.record.members) == 2
    submit(books, 3, received=utc_clock() - timedelta(days=25))
    claimed, _ = run_once(books, "run-3", min_requests=3, max_wait_hours=10_000)
    assert "month ends" in claimed.reason


def test_a_run_forgets_a_bounded_share(books):
    earlier = utc_clock() - timedelta(minutes=1)  # the index counts whole seconds
    many = [submit(books, *range(start, start + 60), name=f"many-{start}", received=earlier) for start in (0, 100, 200)]
    claimed, _ = run_once(books, "run-1", max_forget_fraction=0.13)
    assert (len(claimed.record.members), claimed.record.forget_count) == (2, 120)
    assert statuses(books, *many) == [Status.COMPLETED, Status.COMPLETED, Status.QUEUED]
    huge = submit(books, *range(300, 600), name="huge")
    run_once(books, "run-2", max_forget_fraction=0.13)
    claimed, _ = run_once(books, "run-3", max_forget_fraction=0.13)
    assert [member.id for member in claimed.record.members] == [huge]
    assert claimed.record.method == "retrain"


def test_all_of_the_training_data_is_never_forgotten(books):
    everything = submit(books, *range(toy.SAMPLES), name="everything")
    claimed, _ = run_once(books, "run-1")
    assert (claimed.record, statuses(books, everything)) == (None, [Status.FAILED])


def test_a_line_in_use_is_left_alone(books):
    submit(books, 1)
    toy.claim_next(books, "run-1")
    other = toy.claim_next(books, "run-2")
    assert other.record is None
    assert "run-1" in other.reason
    assert settle(books, LINE, "run-2", toy.terms()).status is None
    assert holder_of(books.store, LINE) == "run-1"


def test_a_claim_may_be_repeated(books):
    requests = [submit(books, 1), submit(books, 2)]
    first = toy.claim_next(books, "run-1")
    second = toy.claim_next(books, "run-1")
    assert second.record == first.record
    assert statuses(books, *requests) == [Status.IN_PROGRESS] * 2


def test_a_run_without_a_verdict_tries_again_and_a_dead_run_is_recovered(books):
    request = submit(books, 1)
    toy.claim_next(books, "run-1", lease_seconds=1)
    settled = settle(books, LINE, "run-1", toy.terms())
    assert (settled.status, settled.queued) == ("failed", [request])
    toy.claim_next(books, "run-2", lease_seconds=1)
    wait_for_the_lease(books)
    claimed, _ = run_once(books, "run-3")
    assert list(claimed.recovered) == [request]
    assert books.ledger.state(request).last.attempt == 3
    assert statuses(books, request) == [Status.COMPLETED]


def test_a_run_that_published_and_died_is_completed_by_the_next(books):
    request = submit(books, 1)
    claimed = toy.claim_next(books, "run-1", lease_seconds=1)
    version = toy.erase(books, claimed.record)
    wait_for_the_lease(books)
    after, _ = run_once(books, "run-2")
    assert (after.record, list(after.recovered)) == (None, [request])
    last = books.ledger.state(request).last
    assert (last.to_status, last.run, last.outcome) == (Status.COMPLETED, "run-1", Outcome.UNLEARNED)
    assert toy.head(books.store).digest == version


def test_a_late_publish_of_a_run_that_was_given_up_is_refused_by_its_own_log(books):
    request = submit(books, 1)
    claimed = toy.claim_next(books, "run-1")
    settle(books, LINE, "run-1", toy.terms())
    with pytest.raises(ConflictError, match="has ended"):
        toy.erase_late(books, claimed.record)
    assert statuses(books, request) == [Status.QUEUED]


def test_a_publish_that_slipped_through_is_found_by_the_next_claim(books):
    request = submit(books, 1)
    claimed = toy.claim_next(books, "run-1")
    settle(books, LINE, "run-1", toy.terms())
    gone = toy.forgotten(books.store, toy.head(books.store)) | {toy.sample(1)}
    version = toy.publish(books.store, LINE, claimed.record.parent, gone, "run-1", 1)
    after, _ = run_once(books, "run-2")
    last = books.ledger.state(request).last
    assert after.record is None
    assert (last.outcome, last.to_status) == (Outcome.UNLEARNED, Status.COMPLETED)
    assert json.loads(books.store.get(certificate_key(request)).data)["version"] == version


def test_a_stale_run_tries_again_as_it_was(books):
    request = submit(books, 1)
    claimed = toy.claim_next(books, "run-1")
    toy.publish(books.store, LINE, claimed.record.parent, {toy.sample(9)}, None, 1)
    with pytest.raises(ConflictError, match="stale parent"):
        toy.erase(books, claimed.record)
    settled = settle(books, LINE, "run-1", toy.terms())
    last = books.ledger.state(request).last
    assert (settled.status, last.rung, last.attempt) == ("stale_parent", 0, 2)
    run_once(books, "run-2")
    assert toy.forgotten(books.store, toy.head(books.store)) == {toy.sample(1), toy.sample(9)}


def test_attempts_are_bounded(books):
    request = submit(books, 1)
    for number in range(3):
        toy.claim_next(books, f"run-{number}", max_attempts=3)
        settle(books, LINE, f"run-{number}", toy.terms(max_attempts=3))
    last = books.ledger.state(request).last
    assert (last.to_status, last.attempt) == (Status.FAILED, 3)
    assert "attempts are used up" in last.reason


def test_a_held_request_is_not_claimed(books):
    held, free = submit(books, 1), submit(books, 2)
    books.ledger.hold(held, "ana", "identity in doubt")
    run_once(books, "run-1")
    assert statuses(books, held, free) == [Status.ON_HOLD, Status.COMPLETED]


def wait_for_the_lease(books):
    import time

    deadline = time.monotonic() + 30
    while holder_of(books.store, LINE) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.3)
