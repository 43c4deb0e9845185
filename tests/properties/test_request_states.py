"""The ledger against a small model of its rules: many steps on a store in memory, some on a real one."""

import os
import secrets
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from salun_core.data.targets import SamplesTarget
from salun_core.errors import ConflictError
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import Outcome, RequestState, Status, is_overdue
from salun_core.storage.s3 import S3Store
from tests.support.decisions import PROCEDURE
from tests.support.memory_store import MemoryStore

pytestmark = pytest.mark.slow

# Written by hand from the rules, not taken from the code under test.
MOVES = {
    "received": {"rejected", "on_hold", "queued", "cancelled"},
    "on_hold": {"queued", "cancelled"},
    "queued": {"on_hold", "in_progress", "failed", "cancelled"},
    "in_progress": {"completed", "queued", "failed"},
    "completed": set(),
    "failed": set(),
    "rejected": set(),
    "cancelled": set(),
}
WRAPPERS = {
    "hold": ({"received", "queued"}, "on_hold"),
    "release": ({"on_hold"}, "queued"),
    "cancel": ({"received", "on_hold", "queued"}, "cancelled"),
    "retry": ({"failed"}, "queued"),
    "reopen": ({"completed"}, "queued"),
}
REQUEUE = {"failed": "retry", "completed": "reopen"}
NAMES = ["r-0", "r-1"]
names = st.sampled_from(NAMES)
START = datetime(2026, 1, 31, 9, tzinfo=UTC)


class Filed:
    def __init__(self, receipt):
        self.receipt, self.due = receipt, datetime.fromisoformat(receipt.due_at)
        self.path, self.attempts, self.redacted = ["received", "queued"], [1], False

    @property
    def status(self):
        return self.path[-1]

    def go(self, to):
        returned = (self.status, to) == ("in_progress", "queued")
        requeued = self.status in {"failed", "completed"}
        self.attempts.append(1 if requeued else self.attempts[-1] + returned)
        self.path.append(to)
        self.redacted |= to in {"cancelled", "rejected"}


def index_key(name, entry):
    received = int(datetime.fromisoformat(entry.receipt.received_at).timestamp())
    return f"index/{entry.status}/faces/{received:010d}.{len(entry.attempts):06d}.{name}"


class LedgerMachine(RuleBasedStateMachine):
    new_store = MemoryStore

    @initialize()
    def open(self):
        self.now, self.model = START, {}
        self.store = type(self).new_store()
        self.ledger = Ledger(self.store, lambda: self.now)
        for name in NAMES:
            self.submit(name)

    @rule(name=names)
    def submit(self, name):
        receipt = self.ledger.submit(name, "faces", SamplesTarget(ids=[f"secret-{name}"]))
        assert self.model.setdefault(name, Filed(receipt)).receipt == receipt
        self.touched = name

    @rule(name=names, number=st.integers(2, 9))
    def submit_another_body(self, name, number):
        with pytest.raises(ConflictError):
            self.ledger.submit(name, "faces", SamplesTarget(ids=[f"secret-{number}"]))
        self.touched = name

    @rule(name=names)
    def redact(self, name):
        """Redact as a completing run does; a second time changes nothing."""
        entry = self.model[name]
        if entry.status == "completed":
            assert redact_request(self.store, name, keep_hashes=True) is not entry.redacted
            entry.redacted = True
        self.touched = name

    @rule(name=names, choices=st.lists(st.integers(0, 59), min_size=2, max_size=10))
    def walk(self, name, choices):
        """Make several allowed transitions, each from the state that was read before."""
        entry = self.model[name]
        for choice in choices:
            ways = sorted(MOVES[entry.status])
            if ways:
                self._move(name, ways[choice % len(ways)], allowed=True, state=self.ledger.state(name))
            elif entry.status in REQUEUE:
                verb = REQUEUE[entry.status]
                self._try(entry, "queued", True, lambda verb=verb: getattr(self.ledger, verb)(name, "ana", "test"))
        self.touched = name

    @rule(name=names, data=st.data())
    def move_late(self, name, data):
        entry = self.model[name]
        to = data.draw(st.sampled_from(sorted(MOVES[entry.path[-2]]) or ["queued"]))
        request, events = self.ledger.get(name), self.ledger.events(name)
        earlier = RequestState(request=request, last=events[-2] if len(events) > 1 else None)
        self._move(name, to, allowed=False, state=earlier)

    @rule(name=names, data=st.data())
    def move_as_not_allowed(self, name, data):
        ways = sorted({status.value for status in Status} - MOVES[self.model[name].status])
        self._move(name, data.draw(st.sampled_from(ways)), allowed=False, state=name)

    def _move(self, name, to, allowed, state):
        more = {"outcome": Outcome.UNLEARNED, "assurance": PROCEDURE} if to == "completed" else {}
        self._try(
            self.model[name],
            to,
            allowed,
            lambda: self.ledger.move(state, Transition(Status(to), "sweep", "test", "run-1", **more)),
        )
        self.touched = name

    @rule(name=names, verb=st.sampled_from(sorted(WRAPPERS)))
    def wrapper(self, name, verb):
        entry = self.model[name]
        sources, to = WRAPPERS[verb]
        self._try(entry, to, entry.status in sources, lambda: getattr(self.ledger, verb)(name, "ana", "test"))
        self.touched = name

    def _try(self, entry, to, allowed, act):
        if not allowed:
            with pytest.raises(ConflictError):
                act()
            return
        event = act()
        assert (event.from_status, event.to_status) == (entry.status, to)
        entry.go(to)

    @rule(days=st.integers(1, 20))
    def wait(self, days):
        self.now += timedelta(days=days)

    @invariant()
    def the_log_is_the_path(self):
        entry, events = self.model[self.touched], self.ledger.events(self.touched)
        assert [event.n for event in events] == list(range(1, len(events) + 1))
        assert ["received", *(event.to_status.value for event in events)] == entry.path
        assert [event.attempt for event in events] == entry.attempts
        assert len({event.writer for event in events}) == len(events)
        assert self.ledger.status(self.touched).value == entry.status

    @invariant()
    def the_index_has_the_status(self):
        assert index_key(self.touched, self.model[self.touched]) in self.index()

    @invariant()
    def the_target_is_removed_exactly_when_the_request_is_settled(self):
        kept = b"secret" in self.store.get(f"requests/{self.touched}/request.json").data
        assert kept is not self.model[self.touched].redacted

    def index(self):
        return {row.key for row in self.store.list("index/")}

    @invariant()
    def only_unsettled_late_requests_are_overdue(self):
        states = self.ledger.list()
        assert {state.request.id: state.status.value for state in states} == {
            name: entry.status for name, entry in self.model.items()
        }
        assert self.index() == {index_key(name, entry) for name, entry in self.model.items()}  # no stale entry is left
        late = {state.request.id for state in states if is_overdue(state.request, state.status, self.now)}
        expected = {
            name
            for name, entry in self.model.items()
            if entry.status not in {"completed", "rejected", "cancelled"} and self.now > entry.due
        }
        assert late == expected


LedgerTest = LedgerMachine.TestCase
EXAMPLES = 500 if os.environ.get("SALUN_RELIABILITY") == "full" else 40
LedgerTest.settings = settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None)


@pytest.mark.s3
def test_a_real_store_follows_the_same_rules(store):
    class OnS3(LedgerMachine):
        def new_store():
            return S3Store("salun", secrets.token_hex(8), client=store._client)

    quick = settings(
        phases=[Phase.explicit, Phase.generate],  # to shrink a failure takes minutes there
        max_examples=3,
        stateful_step_count=10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(OnS3, settings=quick)
