"""Claims a batch of deletion requests for a run: takes the lease, marks the requests as in progress, freezes the set.

The lease keeps two runs from the same work; the events keep the ledger right. The order of the writes is:

1. Take the lease of the model line, also from a run that is dead (`liveness`). Its epoch is higher than that of each
   earlier holder and goes into every event. It is renewed while the claim works.
2. Settle the requests that dead runs left in progress: those of a run that published are completed and certified.
3. Move each request to `in_progress`; requests that name nothing to erase are completed at once. Requests that need a
   person (names that the data do not have, a class that may be two) are put on hold before it: nothing is guessed.
4. Store the frozen forget set, then the record of the run, then the run's first event.

Failures and what follows from them:

- The process dies after 1: the next sweep takes the lease over, and claims.
- It dies after some requests were put on hold: they stay there, and the others are still queued.
- It dies during 3 or 4: requests are in progress for a run without a record. The same run finds its requests again and
  continues. Another run settles it first: the requests are queued again, unchanged.
- It dies after 4: the same run reads the record and gets the same batch.
- It stalls until another run takes the lease and settles this one. When it wakes up, its events are refused (their
  numbers are taken), its log has ended, and HEAD has another parent, each of which stops it.
- It was settled as failed and still published, because it passed its last look at the log before: step 3 of the next
  claim finds that version and completes the requests instead of erasing them again.
- A reply is lost: the store reads the document back and finds its own random `writer`; the lease is kept by its holder.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from salun_core.config import parse
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import AmbiguousTargetError, ConflictError, LineHeldError, RunSettledError, SalunError
from salun_core.gate import Cause
from salun_core.methods.recipe import Recipe
from salun_core.requests.index import IndexEntry, read_entries
from salun_core.requests.ledger import Transition
from salun_core.requests.resolve import AMBIGUOUS, Resolved, Resolver, unmatched
from salun_core.requests.schema import RequestState, Review, Status, Tried
from salun_core.storage.keys import scratch_key, work_key
from salun_core.storage.leases import SUBMIT_AGAIN, release
from salun_core.sweeps.context import SweepContext, in_parallel
from salun_core.sweeps.heartbeat import beating, hold_line
from salun_core.sweeps.policy import SweepPolicy, due_when, last_resort, next_level, why_due
from salun_core.sweeps.runs import ENDED, RunMember, RunRecord
from salun_core.sweeps.settle import complete, decision_about, in_progress, published_by, recover
from salun_core.times import as_utc

if TYPE_CHECKING:
    from salun_core.tasks.line import OpenLine

FORGET_FILE = "forget.json"
_NO_REQUEST = "no request waits"
_LOOKED_AT = 4  # batches of waiting requests that are read to fill one: others may have another group or level


class Skipped(StrEnum):
    """Why a sweep claims nothing."""

    NO_REQUESTS = "no_requests"
    NOT_DUE = "not_due"
    LINE_HELD = "line_held"


@dataclass(frozen=True)
class Claim:
    """What a sweep claimed.

    Args:
        recipe: how the run unlearns; without a batch the first recipe, with its method's defaults.
        record: of the run; None if there is nothing to do.
        forget_uri: address of the frozen forget set; empty without a batch.
        reason: why the batch is due, or why there is none.
        skipped: why there is none; None with a batch, and if all that was due was settled by the claim itself.
        due_at: when a batch is due at the latest (ISO 8601), if requests wait and none is due.
        due: how many requests wait that are due, if the line is held by another run.
        nothing_to_erase: requests that were completed at once, since nothing that they name was trained on.
        held: requests that were put on hold, since a person must review what they name.
    """

    recipe: Recipe
    record: RunRecord | None = None
    forget_uri: str = ""
    reason: str = ""
    nothing_to_erase: Sequence[str] = ()
    refused: Sequence[str] = ()
    held: Sequence[str] = ()
    recovered: Sequence[str] = ()
    skipped: Skipped | None = None
    due: int = 0
    due_at: str | None = None

    @property
    def requests(self) -> int:
        """How many requests the run erases; 0 if there is nothing to do."""
        return len(self.record.members) if self.record else 0

    @classmethod
    def nothing(cls, policy: SweepPolicy, reason: str = "", skipped: Skipped | None = None, due: int = 0) -> Claim:
        """Return a claim without a batch."""
        first = policy.recipes[0]
        return cls(Recipe(method=first.method, density=first.density), reason=reason, skipped=skipped, due=due)


def preview(context: SweepContext, line: str, policy: SweepPolicy) -> Claim:
    """Describe as a reason what a sweep would claim: how many requests wait, and whether a batch is due."""
    waiting = context.ledger.entries(Status.QUEUED, line)
    why = _why_due(context, waiting, policy)
    if why or not waiting:
        due = f"a batch is due: {why}" if why else "no batch is due"
        return Claim.nothing(policy, f"{len(waiting)} waiting; {due}")
    return replace(Claim.nothing(policy, _not_due(waiting, policy)), due_at=_due_at(waiting, policy))


def claim(
    context: SweepContext, line: OpenLine, run: str, policy: SweepPolicy, resolver_of: Callable[[OpenLine], Resolver]
) -> Claim:
    """Claim the next batch of a model line for a run; repeating the call for the same run gives the same batch.

    `resolver_of` builds the resolver for the line at HEAD, and is called only when a batch is due. RunSettledError if
    the run has ended already; it does not hold the line then.
    """
    try:
        lease = hold_line(context.store, line.name, run, policy.lease_seconds)
    except LineHeldError as error:
        waiting = context.ledger.entries(Status.QUEUED, line.name)
        due = len(waiting) if _why_due(context, waiting, policy) else 0
        return Claim.nothing(policy, f"{error.what}: {error.why}", Skipped.LINE_HELD, due)
    with beating(context.store, lease):
        record = context.runs.read(run)
        if record is not None:
            return _claimed_before(context, record, policy)
        recovered = recover(context, line.name, run)
        states, reason, skipped = _next_batch(context, line.name, run, policy)
        found = replace(Claim.nothing(policy, reason, skipped), recovered=recovered)
        if skipped is Skipped.NOT_DUE:
            found = replace(found, due_at=_due_at(context.ledger.entries(Status.QUEUED, line.name), policy))
        if not states:
            return found
        line = line.again()  # a run that held the line before may have published since the policy was made
        return _Batch(context, line, run, policy, lease.epoch, resolver_of(line)).claim(states, found)


def _claimed_before(context: SweepContext, record: RunRecord, policy: SweepPolicy) -> Claim:
    status = context.runs.status(record.run)
    if status in ENDED:
        release(context.store, record.line, record.run)
        raise RunSettledError(f"run {record.run} has ended", f"it is {status}", SUBMIT_AGAIN)
    context.runs.start(record, context.actor)
    return _with_record(Claim.nothing(policy, "claimed before"), context, record)


def _with_record(found: Claim, context: SweepContext, record: RunRecord) -> Claim:
    uri = f"{context.store.uri}/{scratch_key(record.run, FORGET_FILE)}"
    return replace(found, recipe=record.recipe, record=record, forget_uri=uri)


def _next_batch(
    context: SweepContext, line: str, run: str, policy: SweepPolicy
) -> tuple[list[RequestState], str, Skipped | None]:
    """Find the requests that belong to one batch with the oldest waiting one, and why the batch is due, or is not."""
    ours = in_progress(context, line, run)
    if ours:  # an earlier attempt of this step died before it recorded the run
        return ours, "claimed before", None
    waiting = context.ledger.entries(Status.QUEUED, line)
    reason = _why_due(context, waiting, policy)
    if reason is None:
        if waiting:
            return [], _not_due(waiting, policy), Skipped.NOT_DUE
        return [], _NO_REQUEST, Skipped.NO_REQUESTS
    found: list[RequestState] = []
    together: list[RequestState] = []
    size = policy.max_requests
    for start in range(0, min(len(waiting), _LOOKED_AT * size), size):
        states = read_entries(context.store, waiting[start : start + size])
        found += [state for state in states if state.status is Status.QUEUED]
        first = min(found, key=lambda state: (state.request.due, state.request.id), default=None)
        together = [state for state in found if first and _kind_of(state) == _kind_of(first)]
        if len(together) >= size:
            break
    return (together, reason, None) if together else ([], _NO_REQUEST, Skipped.NO_REQUESTS)


def _due_at(waiting: Sequence[IndexEntry], policy: SweepPolicy) -> str | None:
    when = due_when([datetime.fromtimestamp(entry.received, UTC) for entry in waiting], policy)
    return when.isoformat() if when else None


def _not_due(waiting: Sequence[IndexEntry], policy: SweepPolicy) -> str:
    """Return how many requests wait, and when they become a batch."""
    when = (_due_at(waiting, policy) or "")[:16].replace("T", " ")
    more = policy.min_requests - len(waiting)
    return f"{len(waiting)} waiting, and no batch is due before {when} UTC, unless {more} more are filed"


def _why_due(context: SweepContext, waiting: Sequence[IndexEntry], policy: SweepPolicy) -> str | None:
    received = [datetime.fromtimestamp(entry.received, UTC) for entry in waiting]
    returned = sum(entry.n > 1 for entry in waiting)
    return why_due(received, returned, as_utc(context.clock()), policy)


_Kind = tuple[str | None, int, tuple[tuple[int, tuple[Cause, ...]], ...]]


def _kind_of(state: RequestState) -> _Kind:
    """Return what the requests of a batch share: the half of a refused batch, the level, and the refused recipes."""
    if state.last is None:
        return None, 0, ()
    tried = tuple((item.rung, tuple(item.causes)) for item in state.last.tried or ())
    return state.last.group, state.last.rung, tried


_Item = tuple[RequestState, Resolved]


@dataclass
class _Batch:
    """Claims the requests of one batch against one version.

    `nothing` names nothing to erase, `refused` failed, and `held` waits for a person.
    """

    context: SweepContext
    line: OpenLine
    run: str
    policy: SweepPolicy
    epoch: int
    resolver: Resolver
    nothing: list[_Item] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def claim(self, states: Sequence[RequestState], found: Claim) -> Claim:
        """Resolve the requests, move those of the batch to in progress, and record the run."""
        chosen = self._choose(self._without_erased(states))
        taken = [item for item in in_parallel(lambda item: self._take(*item), chosen) if item is not None]
        for state, resolved in self.nothing:
            item = self._take(state, resolved)
            if item is not None:
                complete(self.context, item[0], _member(*item), self.line.version, None)
        settled = tuple(state.request.id for state, _ in self.nothing)
        found = replace(found, nothing_to_erase=settled, refused=tuple(self.refused), held=tuple(self.held))
        if not taken:
            if settled:
                return replace(found, reason="nothing left to erase")
            if self.held:
                return replace(found, reason=f"{len(self.held)} held for review, and nothing else is to be erased")
            return found if self.refused else replace(found, reason=_NO_REQUEST, skipped=Skipped.NO_REQUESTS)
        frozen = self.resolver.freeze_forget_set([state.request for state, _ in taken])
        record = self._record(taken, _kind_of(states[0]), sha256_bytes(frozen))
        self.context.store.put_new(scratch_key(self.run, FORGET_FILE), frozen)
        self.context.runs.start(record, self.context.actor)
        return _with_record(found, self.context, record)

    def _without_erased(self, states: Sequence[RequestState]) -> list[RequestState]:
        """Complete the requests of runs that published after they were given up, and return the others."""
        tried = in_parallel(self._earlier_runs, states)
        records = [self.context.runs.read(run) for run in {run for runs in tried for run in runs}]
        late = {
            record.run: (record, version)
            for record in records
            if record is not None and (version := published_by(self.context, record)) is not None
        }
        rest = []
        for state, runs in zip(states, tried, strict=True):
            record, version = next((late[run] for run in runs if run in late), (None, None))
            member = next((item for item in record.members if item.id == state.request.id), None) if record else None
            if record is None or version is None or member is None:
                rest.append(state)
            elif (item := self._take(state, Resolved((), member.forget_digest, member.named))) is not None:
                complete(self.context, item[0], member, version, record, decision_about(self.context.store, version))
        return rest

    def _earlier_runs(self, state: RequestState) -> list[str]:
        """Return the runs that claimed a request since it was last completed: each may have published late."""
        if state.last is None or state.last.n < 3:  # no run has returned it yet
            return []
        runs: list[str] = []
        for event in self.context.ledger.events(state.request.id):
            runs = [] if event.to_status is Status.COMPLETED else [*runs, event.run or ""]
        return [run for run in dict.fromkeys(runs) if run not in {"", self.run}]

    def _choose(self, states: Sequence[RequestState]) -> list[_Item]:
        """Return requests until the limits of a run are reached; the first one that names something always fits."""
        chosen: list[_Item] = []
        samples: frozenset[str] = frozenset()
        for state in states:
            resolved = self._resolve(state)
            if resolved is None:
                continue
            if not resolved.ids:
                self.nothing.append((state, resolved))
                continue
            larger = samples | resolved.samples
            if chosen and len(larger) > self._sample_limit:
                continue
            chosen.append((state, resolved))
            samples = larger
            if len(chosen) == self.policy.max_requests:
                break
        return chosen

    @property
    def _sample_limit(self) -> float:
        return self.policy.max_forget_fraction * self.resolver.train_count

    def _resolve(self, state: RequestState) -> Resolved | None:
        """Find what a request names, or hold it or let it fail; the reason names nothing that the request does."""
        try:
            resolved = self.resolver.resolve(state.request)
            if resolved.unknown and not (resolved.ids and state.last and state.last.known_only):
                self._hold(state, Review.UNMATCHED, unmatched(resolved.unknown, len(resolved.ids)))
                return None
            if not resolved.samples or len(resolved.samples) < self.resolver.train_count:
                return resolved
            reason = "it names all of the training data"
        except AmbiguousTargetError:
            self._hold(state, Review.AMBIGUOUS, AMBIGUOUS)
            return None
        except SalunError as error:
            reason = f"what it names cannot be resolved ({type(error).__name__})"
        with suppress(ConflictError):  # it was held or cancelled meanwhile
            self.context.ledger.move(state, Transition(Status.FAILED, self.context.actor, reason))
            self.refused.append(state.request.id)
        return None

    def _hold(self, state: RequestState, outcome: Review, reason: str) -> None:
        """Put a request on hold for a person. One that an earlier attempt of this run claimed is queued before."""
        ledger, actor = self.context.ledger, self.context.actor
        with suppress(ConflictError):  # it was held or cancelled meanwhile
            if state.status is Status.IN_PROGRESS:
                event = ledger.move(state, Transition(Status.QUEUED, actor, "not begun"))
                state = RequestState(request=state.request, last=event)
            ledger.move(state, Transition(Status.ON_HOLD, actor, reason, outcome=outcome))
            self.held.append(state.request.id)

    def _take(self, state: RequestState, resolved: Resolved) -> _Item | None:
        """Move a request to in progress; None if it was held or cancelled meanwhile."""
        if state.status is Status.IN_PROGRESS:
            return state, resolved
        group, level, _ = _kind_of(state)
        transition = Transition(
            Status.IN_PROGRESS, self.context.actor, "claimed", self.run, epoch=self.epoch, level=level, group=group
        )
        try:
            event = self.context.ledger.move(state, transition)
        except ConflictError:
            return None
        return RequestState(request=state.request, last=event), resolved

    def _record(self, taken: Sequence[_Item], kind: _Kind, frozen_digest: str) -> RunRecord:
        group, level, before = kind
        ids = sorted({name for _, resolved in taken for name in resolved.ids})
        samples = len({name for _, resolved in taken for name in resolved.samples})
        level, tried = self._level(ids, samples, level, dict(before))
        fields = {
            "run": self.run,
            "line": self.line.name,
            "parent": self.line.digest,
            "epoch": self.epoch,
            "created_at": as_utc(self.context.clock()).isoformat(),
            **self.policy.all_recipes[level].model_dump(),
            "rung": level,
            "group": group,
            "tried": [Tried(rung=number, causes=list(causes)) for number, causes in sorted(tried.items())] or None,
            "levels": self.policy.levels,
            "max_attempts": self.policy.max_attempts,
            "work_key": self._work(ids, level),
            "members": [_member(state, resolved).model_dump() for state, resolved in taken],
            "forget_sha256": frozen_digest,
            "policy_digest": self.policy.policy_digest,
            "forget_count": len(ids),
            "train_count": self.resolver.train_count,
        }
        return parse(RunRecord, fields, f"run {self.run}")

    def _level(
        self, ids: Sequence[str], samples: int, level: int, tried: dict[int, tuple[Cause, ...]]
    ) -> tuple[int, dict[int, tuple[Cause, ...]]]:
        """Return the escalation level of the run, and the refused recipes by level with their causes.

        The refusals decide (`next_level`), also those of equal work, which would be refused again. A request that
        exceeds the limit of samples begins with the last resort. After all recipes only a half of a refused batch or a
        request that a person queued again is left: the half repeats its level, the request begins at the last resort.
        """
        levels = self.policy.levels
        tried = {number: causes for number, causes in tried.items() if number < len(levels)}
        level = min(level, len(levels) - 1)
        if tried:
            found = next_level(levels, tried)
            level = level if found is None else found
        elif samples > self._sample_limit:
            level = last_resort(levels, tried)
        while (causes := self._refused(ids, level)) is not None and level not in tried:
            tried[level] = causes
            found = next_level(levels, tried)
            level = last_resort(levels, tried) if found is None else found
        return level, tried

    def _refused(self, ids: Sequence[str], level: int) -> tuple[Cause, ...] | None:
        """Return the causes for which the gate refused equal work; None if it did not."""
        stored = self.context.store.get(work_key(self._work(ids, level)))
        if stored is None:
            return None
        try:
            noted = json.loads(stored.data)["causes"]
            return tuple(cause for cause in Cause if cause in noted)
        except (ValueError, KeyError, TypeError):
            return ()

    def _work(self, ids: Sequence[str], level: int) -> str:
        recipe = self.policy.all_recipes[level]
        work = {
            "line": self.line.name,
            "parent": self.line.digest,
            "forget": ids,
            "recipe": recipe.model_dump(mode="json", exclude={"seed"}),
            "seed": recipe.seed,
            "policy": self.policy.policy_uri,
        }
        return digest_json(work)


def _member(state: RequestState, resolved: Resolved) -> RunMember:
    assert state.last is not None
    return RunMember(
        id=state.request.id,
        event=state.last.n,
        attempt=state.last.attempt,
        forget_digest=resolved.digest,
        salt=secrets.token_hex(16),
        found=len(resolved.ids),
        named=resolved.named,
    )
