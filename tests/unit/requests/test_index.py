"""The index of request statuses: kills at every write, races, entries of old crashes and restored backups."""

from datetime import timedelta

import pytest

from salun_core.data.targets import SamplesTarget
from salun_core.errors import ConflictError, IntegrityError, StoreError
from salun_core.requests.index import IndexEntry, entries
from salun_core.requests.ledger import Ledger, Transition
from salun_core.requests.schema import Outcome, Status
from tests.support.decisions import PROCEDURE
from tests.support.memory_store import Killed, MemoryStore

TARGET = SamplesTarget(ids=["secret-1", "secret-2"])


@pytest.fixture
def store():
    return MemoryStore()


def submit(ledger, name="r-1", line="faces"):
    return ledger.submit(name, line, TARGET)


def complete(ledger):
    ledger.move(
        "r-1", Transition(Status.COMPLETED, "sweep", "published", outcome=Outcome.UNLEARNED, assurance=PROCEDURE)
    )


def claim(ledger):
    ledger.move("r-1", Transition(Status.IN_PROGRESS, "sweep", "claimed"))


ACTS = {
    "submit": [submit],
    "hold": [submit, lambda ledger: ledger.hold("r-1", "ana", "test")],
    "claim": [submit, claim],
    "cancel": [submit, lambda ledger: ledger.cancel("r-1", "ana", "test")],
    "complete": [submit, claim, complete],
    "reopen": [submit, claim, complete, lambda ledger: ledger.reopen("r-1", "ana", "test")],
}


def index(store):
    return [key for key in store.objects if key.startswith("index/")]


def standing(ledger):
    """The keys of the entries that there must be, built by hand."""
    found = {}
    for name in {key.split("/")[1] for key in ledger._store.objects if key.endswith("request.json")}:
        request, events = ledger.get(name), ledger.events(name)
        seconds = f"{int(request.received.timestamp()):010d}"
        found[name] = (
            f"index/{events[-1].to_status if events else 'queued'}/{request.model_line}"
            f"/{seconds}.{max(1, len(events)):06d}.{name}"
        )
    return sorted(found.values())


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("writes", range(5))
def test_a_call_killed_at_any_write_leaves_the_entry_and_the_next_call_continues(store, clock, act, writes):
    *before, last = ACTS[act]
    ledger = Ledger(store, clock)
    for step in before:
        step(ledger)
    store.writes_left = writes
    try:
        last(ledger)
        done = True
    except Killed:
        done = False
    store.writes_left = None
    assert set(standing(ledger)) <= set(index(store))
    status = ledger.state("r-1").status if standing(ledger) else None
    if status is not None:
        assert [state.request.id for state in ledger.list(statuses=[status])] == ["r-1"]
    if not done:
        try:
            last(ledger)
        except ConflictError:  # its event was written; what was to follow is done now
            assert act != "submit"
    assert {state.request.id for state in ledger.list()} == {"r-1"}
    assert index(store) == standing(ledger)
    if act == "cancel":
        assert b"secret" not in store.objects["requests/r-1/request.json"][0]


def test_entries_are_parsed_from_keys_oldest_request_first(store, clock):
    ledger = Ledger(store, clock)
    for number, line in enumerate(["faces", "cats", "faces.v2"]):
        ledger.submit(f"r.{number}", line, TARGET, clock() - timedelta(days=number))
    ledger.hold("r.1", "ana", "test")
    assert [entry.request for entry in ledger.entries(Status.QUEUED)] == ["r.2", "r.0"]
    (entry,) = ledger.entries(Status.QUEUED, "faces")
    assert entry == IndexEntry("r.0", "faces", Status.QUEUED, int(clock().timestamp()), 1)
    assert ledger.entries(Status.ON_HOLD)[0].n == 2
    assert ledger.entries(Status.ON_HOLD, "faces") == []


def test_each_line_lists_its_own_requests(store, clock):
    ledger = Ledger(store, clock)
    for number in range(6):
        submit(ledger, f"r-{number}", "cats" if number % 2 else "faces")
    assert [state.request.id for state in ledger.list("cats", [Status.QUEUED])] == ["r-1", "r-3", "r-5"]
    assert ledger.list("cats", [Status.IN_PROGRESS, Status.FAILED]) == []


def test_the_cost_of_a_claim_does_not_grow_with_settled_requests(store, clock):
    ledger = Ledger(store, clock)

    def calls():
        before = store.calls
        assert len(ledger.list("faces", [Status.QUEUED])) == 2
        return store.calls - before

    submit(ledger, "r-1")
    submit(ledger, "r-2")
    few = calls()
    for number in range(10, 60):
        submit(ledger, f"r-{number}")
        ledger.cancel(f"r-{number}", "ana", "test")
    assert calls() == few


def test_a_losing_mover_drops_its_entry(store, clock):
    ledger = Ledger(store, clock)
    submit(ledger)
    seen = ledger.state("r-1")
    ledger.hold("r-1", "ana", "first")
    for to in (Status.IN_PROGRESS, Status.ON_HOLD):  # another status, and that of the winner
        with pytest.raises(ConflictError, match="another process moved"):
            ledger.move(seen, Transition(to, "sweep", "late"))
        assert index(store) == standing(ledger)
    ledger.release("r-1", "ana", "test")
    with pytest.raises(ConflictError):
        ledger.move(seen, Transition(Status.ON_HOLD, "sweep", "later still"))
    assert index(store) == standing(ledger)


def test_filing_again_leaves_no_extra_entry(store, clock):
    ledger = Ledger(store, clock)
    submit(ledger)
    claim(ledger)
    clock.tick(hours=1)
    submit(ledger)
    ledger.submit("r-1", "faces", TARGET, clock() - timedelta(hours=1))
    with pytest.raises(ConflictError):
        submit(ledger, line="cats")
    assert index(store) == standing(ledger)


def crash(store, ledger, act, writes):
    store.writes_left = writes
    with pytest.raises(Killed):
        act(ledger)
    store.writes_left = None


@pytest.mark.parametrize("act", [lambda ledger: submit(ledger, "r-2"), claim])
def test_an_entry_without_its_event_is_ignored_and_deleted_after_a_day(store, clock, act):
    ledger = Ledger(store, clock)
    submit(ledger)
    crash(store, ledger, act, 1)
    for name, hours, left in (("late-1", 23, 2), ("late-2", 2, 1)):
        store.now += timedelta(hours=hours)
        submit(ledger, name)  # the store's clock is seen by what it holds
        states = ledger.list("faces", [Status.QUEUED, Status.IN_PROGRESS])
        assert {"r-1", name} <= {state.request.id for state in states} <= {"r-1", "late-1", "late-2"}
        assert len([key for key in index(store) if "late" not in key]) == left


def test_the_only_entry_of_a_request_without_events_stays(store, clock):
    ledger = Ledger(store, clock)
    crash(store, ledger, submit, 2)
    submit(ledger, "r-2")
    store.now += timedelta(days=9)
    submit(ledger, "r-3")
    before, calls = dict(store.objects), store.calls
    assert [state.request.id for state in ledger.list(statuses=[Status.QUEUED])] == ["r-2", "r-3"]
    assert [state.request.id for state in ledger.list(statuses=[Status.RECEIVED])] == ["r-1"]
    assert store.objects == before  # those that are right stay untouched, however old
    once = store.calls - calls
    for name in ("r-2", "r-3"):  # with more than one event their entries need no look at the request
        ledger.hold(name, "ana", "test")
        ledger.release(name, "ana", "test")
    calls = store.calls
    assert len(ledger.list(statuses=[Status.RECEIVED])) == 1
    assert store.calls - calls < once / 2


def test_an_old_entry_that_a_reader_deletes_during_a_move_is_put_again(store, clock):
    """The mover finds the entry of a crash of long ago; a reader takes it away before the event is written."""
    ledger = Ledger(store, clock)
    submit(ledger)
    crash(store, ledger, claim, 1)
    (old,) = [key for key in index(store) if "in_progress" in key]
    store.now += timedelta(days=2)
    create = store.put_new

    def put_new(key, data):
        if key.endswith("000002.json"):
            store.delete(old)
        return create(key, data)

    store.put_new = put_new
    claim(ledger)
    assert index(store) == standing(ledger)


def test_a_reader_without_the_right_to_delete_can_still_list(store, clock):
    ledger = Ledger(store, clock)
    submit(ledger)
    store.objects["index/queued/faces/0000000001.000001.r-1"] = store.objects[index(store)[0]]

    def refuse(key):
        raise StoreError("access denied")

    store.delete = refuse
    assert [state.request.id for state in ledger.list()] == ["r-1"]


def test_a_dry_run_mends_nothing(store, clock):
    ledger = Ledger(store, clock)
    submit(ledger)
    store.objects["index/queued/faces/0000000001.000001.r-1"] = store.objects[index(store)[0]]
    before = dict(store.objects)
    dry = Ledger(store, clock, dry_run=True)
    dry.list()
    dry.cancel("r-1", "ana", "test")
    submit(dry)
    assert dry.reindex() == 1
    assert store.objects == before
    ledger.list()
    assert len(store.objects) == len(before) - 1


def test_an_invalid_entry_is_refused_and_reindex_deletes_it(store, clock):
    ledger = Ledger(store, clock)
    submit(ledger)
    for name in ("junk", "x/y/z", "faces/1.000001.r-1", "faces/0000000001.00000١.r-1", "faces/0000000001.000001.R 1"):
        store.put_new(f"index/queued/{name}", b"")
        with pytest.raises(IntegrityError, match="reindex"):
            entries(store, Status.QUEUED)
        assert ledger.reindex() == 1
        assert index(store) == standing(ledger)


def test_reindex_repairs_the_index_of_a_restored_backup(store, clock):
    ledger = Ledger(store, clock)
    for number in range(8):
        submit(ledger, f"r-{number}")
    for number in range(4):
        ledger.hold(f"r-{number}", "ana", "test")
    right = standing(ledger)
    assert (ledger.reindex(), sorted(index(store))) == (0, right)
    for key in index(store)[:5]:
        del store.objects[key]
    store.put_new("index/completed/faces/0000000001.000001.r-1", b"")
    store.put_new("index/queued/faces/1769850000.000001.r-2", b"")
    assert ledger.reindex() == 7
    assert sorted(index(store)) == right
    for key in index(store):
        del store.objects[key]
    assert ledger.list() == []
    assert ledger.reindex() == 8
    assert sorted(index(store)) == right
