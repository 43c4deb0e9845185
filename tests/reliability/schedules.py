"""Schedules that bring out one seeded defect each, every time: the product must come through them without a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from salun_core.errors import ConflictError
from salun_core.requests.ledger import Transition
from salun_core.requests.schema import Status
from salun_core.storage.keys import event_key, head_key
from salun_core.storage.leases import release
from salun_core.sweeps.settle import settle
from tests.reliability import children, harness, mutants
from tests.reliability.audit import Auditor, Verdict
from tests.reliability.journal import JournalStore
from tests.reliability.plan import Asked, Plan
from tests.reliability.worker import Reader
from tests.support import toy_line as toy
from tests.support.fault_proxy import LOST, FaultProxy

LINE = "line-0"
Schedule = Callable[[Plan, str | None], None]


def judge(uri: str, name: str, mutant: str | None) -> Verdict:
    """Play the schedule of a defect, with the defect or without it, and audit what it left."""
    schedule, requests = SCHEDULES[name]
    with harness.planned(uri, lines=(LINE,), requests=requests, workers=1, lease_seconds=60) as plan:
        with mutants.seeded(mutant):
            found = schedule(plan, mutant)
        store = JournalStore(plan.uri, plan.journal)
        asked = plan.asked() if requests else []
        for item in asked:
            _finish(store, plan, item)
        verdict = Auditor(store, plan.journal).audit(asked, plan.lines)
        reader = Reader(store, plan.journal)
        reader.poll(LINE)
        verdict.torn += reader.torn
        verdict.false_conflicts += found or 0
        return verdict


def _finish(store: JournalStore, plan: Plan, item: Asked) -> None:
    """Do what the next sweeps would, with the product as it is."""
    context = toy.sweep_context(store)
    with suppress(Exception):  # a defect may have left the line so that nothing works any more
        if context.ledger.state(item.id).status is not Status.COMPLETED:
            _sweep(context, plan, f"after-{item.id}")


def _sweep(context, plan: Plan, run: str) -> None:
    claimed = toy.claim_next(context, run, LINE, **plan.policy)
    if claimed.record:
        toy.erase(context, claimed.record)
    settle(context, LINE, run)


def _race_at_the_swap(plan: Plan, mutant: str | None) -> None:
    """A and B both found their parent at HEAD; A swaps, then B."""
    store = JournalStore(plan.uri, plan.journal)
    start, done = toy.head(store, LINE).digest, []

    def first(step: str, key: str) -> None:
        if step == "before put" and key == head_key(LINE) and not done:
            done.append(toy.publish(JournalStore(plan.uri, plan.journal), LINE, start, {toy.sample(0)}, "run-a", 1))

    store.hook = first
    with suppress(ConflictError):
        toy.publish(store, LINE, start, {toy.sample(1)}, "run-b", 1)
    assert done


def _stale_parent(plan: Plan, mutant: str | None) -> None:
    """B looks at HEAD after A has published."""
    store = JournalStore(plan.uri, plan.journal)
    start = toy.head(store, LINE).digest
    toy.publish(store, LINE, start, {toy.sample(0)}, "run-a", 1)
    with suppress(ConflictError):
        toy.publish(store, LINE, start, {toy.sample(1)}, "run-b", 1)


def _two_claims(plan: Plan, mutant: str | None) -> None:
    """Two claimers have read the same last event."""
    store, other = JournalStore(plan.uri, plan.journal), toy.sweep_context(JournalStore(plan.uri, plan.journal))
    context, (item,), done = toy.sweep_context(store), plan.asked(), []
    context.ledger.submit(item.id, LINE, toy.target(*item.numbers))
    state = context.ledger.state(item.id)

    def first(step: str, key: str) -> None:
        if step == "before put" and key == event_key(item.id, 2) and not done:
            done.append(other.ledger.move(state, Transition(Status.IN_PROGRESS, "b", "claimed", run="run-b", epoch=1)))

    store.hook = first
    with suppress(ConflictError):
        context.ledger.move(state, Transition(Status.IN_PROGRESS, "a", "claimed", run="run-a", epoch=1))
    assert done


def _lost_reply(plan: Plan, mutant: str | None) -> int:
    """The reply to a move is lost on the way; returns how often our own write was called somebody else's."""
    direct, lost = JournalStore(plan.uri, plan.journal), []
    toy.sweep_context(direct).ledger.submit("r-0", LINE, toy.target(0))

    def lose(request: str) -> bytes | None:
        if request.startswith("PUT") and event_key("r-0", 2) in request and not lost:
            lost.append(request)
            return LOST
        return None

    parts = urlsplit(direct.endpoint)
    with FaultProxy((parts.hostname, parts.port), lose) as proxy:
        context = toy.sweep_context(JournalStore(plan.uri, plan.journal, endpoint=proxy.endpoint))
        try:
            context.ledger.hold("r-0", "ana", "identity in doubt")
        except ConflictError:
            return 1
    assert lost
    return 0


def _second_holder(plan: Plan, mutant: str | None) -> None:
    """A worker whose clock is an hour ahead looks at a lease that was just taken."""
    for run in ("run-a", "run-b"):
        context = toy.sweep_context(JournalStore(plan.uri, plan.journal))
        for item in plan.asked():
            context.ledger.submit(item.id, LINE, toy.target(*item.numbers))
        toy.claim_next(context, run, LINE, **plan.policy)
    release(JournalStore(plan.uri, plan.journal), LINE, "run-a")


def _killed(step: str, key: str) -> Schedule:
    def schedule(plan: Plan, mutant: str | None) -> None:
        """A worker dies at a step of its publish."""
        store = JournalStore(plan.uri, plan.journal)
        (item,) = plan.asked()
        toy.sweep_context(store).ledger.submit(item.id, LINE, toy.target(*item.numbers))
        child = harness.start(children.die_once, plan, LINE, "run-a", step, key, mutant)
        child.join(120)
        assert child.exitcode == -9
        release(store, LINE, "run-a")  # in place of waiting for its end
        if mutant == "a run is settled by its word":
            _finish(store, plan, item)

    return schedule


SCHEDULES: Mapping[str, tuple[Schedule, int]] = {
    "HEAD is put without its condition": (_race_at_the_swap, 0),
    "the swap is retried on a conflict": (_race_at_the_swap, 0),
    "nobody checks the parent": (_stale_parent, 0),
    "the pointer goes before the files": (_killed("after put", "HEAD.json"), 1),
    "events are put without their condition": (_two_claims, 1),
    "a refused write is not read back": (_lost_reply, 0),
    "a lease runs out by the worker's clock": (_second_holder, 1),
    "the event goes before the state": (_killed("before put", "HEAD.json"), 1),
    "a run is settled by its word": (_killed("after put", "HEAD.json"), 1),
}
"""For each defect its schedule, and how many requests it files."""
