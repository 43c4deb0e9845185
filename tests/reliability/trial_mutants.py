"""Seeded defects of the steps: each takes one safeguard out, in the processes that are forked meanwhile.

Beside each is a trial that brings it out, every time; the product must come through the same trial without a fault.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple
from unittest.mock import patch

from salun_core.errors import ConflictError, RunSettledError
from salun_core.pods import pod
from salun_core.pods import steps as pod_steps
from salun_core.registry import versions
from salun_core.registry.lookup import read_head
from salun_core.steps.outcome import OUTCOME_FILE
from salun_core.storage import leases
from salun_core.storage.keys import run_key
from salun_core.sweeps.runs import RunLog
from tests.reliability.pods import Moment


class Defect(NamedTuple):
    """A seeded defect.

    Args:
        changes: what is changed, and how.
        trial: what `trials.one` takes, to bring it out.
        caught_as: the fault that the auditor counts.
    """

    changes: Sequence[Callable[[], Any]]
    trial: Mapping[str, Any]
    caught_as: str


@contextmanager
def seeded(name: str | None) -> Iterator[None]:
    """Seed a defect by its name; None leaves the product as it is."""
    with ExitStack() as stack:
        for change in DEFECTS[name].changes if name else ():
            stack.enter_context(change())
        yield


def _never_ends() -> Any:
    return patch.object(leases, "_may_be_taken", lambda held, stored, life_of: held.released)


def _settles_nothing() -> Any:
    def settle(of: pod.Pod, made: Any) -> Any:
        if made.kind is pod_steps.Kind.DECISION:
            pod_steps.write_outcome(of.store, pod_steps.published_outcome(of, str(made.facts["version"])))
        return pod_steps.read_outcome(of.store, of.run)

    return patch.object(pod_steps, "_settle_here", settle)


def _works_on() -> Any:
    return patch.object(pod, "read_outcome", lambda store, run: None)


def _overwrites() -> Iterator[Any]:
    def write(store: Any, outcome: Any) -> Any:
        key = run_key(outcome.run, OUTCOME_FILE)
        stored = store.get(key)
        if stored is None:
            store.put_new(key, outcome.canonical())
        else:
            store.put_if(key, outcome.canonical(), stored.etag)
        return outcome

    return patch.multiple(pod, write_outcome=write)


def _publishes_over() -> Any:
    real = versions._swap

    def swap(store: Any, head: Any, parent: Any, etag: Any) -> Any:
        try:
            return real(store, head, parent, etag)
        except ConflictError:
            return real(store, head, parent, read_head(store, head.line)[1])

    return patch.multiple(versions, _check_parent=lambda *_: None, _swap=swap)


def _goes_on_when_settled() -> Any:
    real = RunLog.advance

    def advance(self: RunLog, run: str, to: Any, actor: str, reason: str) -> Any:
        with suppress(RunSettledError):
            return real(self, run, to, actor, reason)
        return to

    return patch.object(RunLog, "advance", advance)


def _needs_no_lease() -> Any:
    return patch.object(pod, "lease_renewed", lambda store, line, run: nullcontext())


DEFECTS: Mapping[str, Defect] = {
    "a lease never ends": Defect(
        [_never_ends], {"scenario": "vanished", "seed": 3, "moment": Moment("mask", 10)}, "blocked"
    ),
    "the gate's step does not settle": Defect([_settles_nothing], {"scenario": "pending", "seed": 4}, "outcomes"),
    "a step works although its run has ended": Defect(
        [_works_on], {"scenario": "retried", "seed": 5, "moment": Moment("claim", 2), "alone": True}, "twice"
    ),
    "a final outcome is overwritten": Defect(
        [_overwrites], {"scenario": "recreated", "seed": 6, "moment": Moment("gate", 10_000)}, "outcomes"
    ),
    "a run that was taken over is not fenced": Defect(
        [_publishes_over, _goes_on_when_settled, _needs_no_lease],
        {
            **{"scenario": "suspended", "seed": 7, "early": False},
            "moment": Moment("gate", 45, signal=signal.SIGSTOP),
        },
        "forks",
    ),
}
"""By name."""
