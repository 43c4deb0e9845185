"""Moments that random kills hardly ever meet: a lost reply while somebody else writes, a publish between two claims."""

from contextlib import suppress

import pytest

from salun_core.errors import ConflictError
from salun_core.registry.lookup import ancestry
from salun_core.requests.ledger import Transition
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import Outcome, Status
from salun_core.storage.keys import event_key, head_key, lease_key, request_key
from salun_core.storage.leases import acquire, holder_of, release
from salun_core.sweeps.rollback import rollback
from salun_core.sweeps.settle import settle
from tests.reliability.faults import LostReplies
from tests.reliability.journal import JournalStore
from tests.support import toy_line as toy

pytestmark = pytest.mark.s3
LINE = toy.LINE


@pytest.fixture
def direct(store):
    return JournalStore(store.uri)


def test_a_lost_swap_is_ours_even_when_it_has_a_child_by_now(direct):
    start, others = toy.begin(direct), []

    def publish_a_child():
        others.append(toy.publish(direct, LINE, toy.head(direct).digest, {"sample-0", "sample-1"}, "run-2", 1))

    lost = LostReplies(direct.uri, publish_a_child)
    lost.waiting.add(head_key(LINE))
    with lost.store() as store:
        ours = toy.publish(store, LINE, start, {"sample-0"}, "run-1", 1)
    assert [version.digest for version in ancestry(direct, LINE)] == [others[0], ours, start]


def test_a_lost_move_is_ours_and_a_racing_one_is_refused(direct):
    context, refused = toy.sweep_context(direct), []
    context.ledger.submit("r-0", LINE, toy.target(0))
    state = context.ledger.state("r-0")

    def race():
        try:
            context.ledger.move(state, Transition(Status.CANCELLED, "b", "withdrawn"))
        except ConflictError as error:
            refused.append(error)

    lost = LostReplies(direct.uri, race)
    lost.waiting.add(event_key("r-0", 2))
    with lost.store() as store:
        toy.sweep_context(store).ledger.hold("r-0", "a", "identity in doubt")
    assert [event.to_status for event in context.ledger.events("r-0")] == [Status.QUEUED, Status.ON_HOLD]
    assert len(refused) == 1
    assert [entry.request for entry in context.ledger.entries(Status.ON_HOLD)] == ["r-0"]
    assert not context.ledger.entries(Status.CANCELLED)


def test_a_lost_release_lets_the_next_one_in(direct):
    acquire(direct, LINE, "run-1", 60)
    lost = LostReplies(direct.uri, lambda: acquire(direct, LINE, "run-2", 60))
    lost.waiting.add(lease_key(LINE))
    with lost.store() as store:
        release(store, LINE, "run-1")
    assert holder_of(direct, LINE) == "run-2"


def test_a_lost_lease_that_a_twin_renews_is_still_that_runs(direct):
    acquire(direct, LINE, "run-0", 60)
    release(direct, LINE, "run-0")
    lost = LostReplies(direct.uri, lambda: acquire(direct, LINE, "run-1", 60))
    lost.waiting.add(lease_key(LINE))
    with lost.store() as store, suppress(ConflictError):  # the twin's word stands; a claim then finds no batch
        acquire(store, LINE, "run-1", 60)
    assert holder_of(direct, LINE) == "run-1"
    assert acquire(direct, LINE, "run-1", 60).epoch == 2


def test_a_lost_redaction_is_done_once(direct):
    toy.sweep_context(direct).ledger.submit("r-0", LINE, toy.target(0))
    bodies = []

    def redact_too():
        redact_request(direct, "r-0", keep_hashes=True)
        bodies.append(direct.get(request_key("r-0")).data)

    lost = LostReplies(direct.uri, redact_too)
    lost.waiting.add(request_key("r-0"))
    with lost.store() as store:
        redact_request(store, "r-0", keep_hashes=True)
    assert direct.get(request_key("r-0")).data == bodies[0]
    assert b"sample-0" not in bodies[0]


def test_what_a_late_worker_published_between_two_claims_is_its_own_erasure(direct):
    start, context = toy.begin(direct), toy.sweep_context(direct)
    context.ledger.submit("r-0", LINE, toy.target(0))
    first = toy.claim_next(context, "run-1")
    release(direct, LINE, "run-1")  # in place of waiting for its end
    second = toy.claim_next(context, "run-2")
    assert list(second.recovered) == ["r-0"]
    toy.publish(direct, LINE, first.record.parent, {"sample-0"}, "run-1", 1)
    with pytest.raises(ConflictError, match="stale parent"):
        toy.erase(context, second.record)
    settle(context, LINE, "run-2")
    toy.claim_next(context, "run-3")
    settle(context, LINE, "run-3")
    last = context.ledger.state("r-0").last
    assert (last.to_status, last.outcome, last.run) == (Status.COMPLETED, Outcome.UNLEARNED, "run-1")
    back = rollback(direct.uri, f"{LINE}@{start}", "ana", "a bad version", reopen=True)
    assert list(back.reopened) == ["r-0"]
    assert context.ledger.status("r-0") is Status.QUEUED
