"""Claims a batch: finds what is due, takes the lease of the line, and freezes the forget set."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from salun_core.config import parse
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import ConflictError, SalunError, UsageError
from salun_core.registry.lookup import Version, read_head, read_version
from salun_core.requests.index import IndexEntry, read_entries
from salun_core.requests.ledger import Transition
from salun_core.requests.resolve import Resolved, Resolver
from salun_core.requests.schema import RequestState, Status
from salun_core.storage.keys import scratch_key, work_key
from salun_core.storage.leases import Lease, acquire
from salun_core.sweeps.context import SweepContext, in_parallel
from salun_core.sweeps.policy import SweepPolicy, why_due
from salun_core.sweeps.runs import ENDED, RunMember, RunRecord
from salun_core.sweeps.settle import complete, published_by, recover
from salun_core.times import as_utc

_LOOKED_AT = 4  # times the size of a batch


@dataclass(frozen=True)
class Found:
    """Requests that may be claimed together, the oldest first, and why now."""

    states: Sequence[RequestState]
    reason: str
    recovered: Sequence[str] = ()


def first_due(context: SweepContext, line: str, run: str, policy: SweepPolicy) -> Found:
    """Find the requests that go together with the oldest one that waits."""
    ours = [state for state in context.ledger.list(line, [Status.IN_PROGRESS]) if state.last and state.last.run == run]
    if ours:  # an earlier attempt of this very step took them, and was killed before it could record them
        return Found(ours, "claimed before")
    waiting = context.ledger.entries(Status.QUEUED, line)
    reason = _why(waiting, context, policy)
    if reason is None:
        return Found([], f"{len(waiting)} waiting, and no batch is due" if waiting else "no request waits")
    states = _together(context, waiting, policy.max_requests)
    return Found(states, reason) if states else Found([], "no request waits")


def _together(context: SweepContext, waiting: Sequence[IndexEntry], size: int) -> list[RequestState]:
    """Read the requests that go with the oldest one, the oldest first, and no more of them than a batch takes."""
    found: list[RequestState] = []
    for start in range(0, _LOOKED_AT * size, size):
        states = read_entries(context.store, waiting[start : start + size])
        found += [state for state in states if state.status is Status.QUEUED]
        first = min(found, key=lambda state: (state.request.due, state.request.id), default=None)
        together = [state for state in found if first and kind_of(state) == kind_of(first)]
        if len(together) >= size or start + size >= len(waiting):
            break
    return together


def kind_of(state: RequestState) -> tuple[str | None, int]:
    """What requests of one batch share: the half of a refused batch, and the recipe that comes next."""
    return (state.last.group, state.last.rung) if state.last else (None, 0)


def _why(waiting: Sequence[IndexEntry], context: SweepContext, policy: SweepPolicy) -> str | None:
    received = [datetime.fromtimestamp(entry.received, UTC) for entry in waiting]
    returned = sum(entry.n > 1 for entry in waiting)
    return why_due(received, returned, as_utc(context.clock()), policy)


def preview(context: SweepContext, line: str, policy: SweepPolicy) -> tuple[int, str | None]:
    """Say what a sweep would do, and write nothing: how many requests wait, and why a batch is due, if one is."""
    waiting = context.ledger.entries(Status.QUEUED, line)
    return len(waiting), _why(waiting, context, policy)


FORGET_FILE = "forget.json"


@dataclass(frozen=True)
class Claim:
    """What a sweep took up.

    Args:
        record: the run's batch; None where there is nothing to do.
        forget_uri: address of the sealed forget set; empty without a batch.
        reason: why the batch is due, or why there is none.
        nothing_to_erase: requests that were settled at once, for nothing that they name was trained on.
        refused: requests that became dead letters, for what they name cannot be.
        recovered: requests of dead runs that were settled first.
    """

    record: RunRecord | None
    forget_uri: str = ""
    reason: str = ""
    nothing_to_erase: Sequence[str] = ()
    refused: Sequence[str] = ()
    recovered: Sequence[str] = ()


def claim(
    context: SweepContext, line: str, run: str, policy: SweepPolicy, resolver_of: Callable[[Version], Resolver]
) -> Claim:
    """Claim the next batch of a model line for a run.

    Args:
        context: where requests and runs are recorded.
        line: the model line.
        run: id of the run.
        policy: of the sweep.
        resolver_of: builds the resolver for the line's HEAD; called only when a batch is due.

    Returns:
        The batch, or why there is none. The same run asks again and gets the same.

    Raises:
        ConflictError: the run has ended already.
        UsageError: the line has no HEAD.
    """
    try:
        lease = acquire(context.store, line, run, policy.lease_seconds)
    except ConflictError as error:
        return Claim(None, reason=f"{error.what}: {error.why}")
    record = context.runs.read(run)
    if record is not None:
        return _again(context, record)
    recovered = recover(context, line, run, policy)
    found = replace(first_due(context, line, run, policy), recovered=tuple(recovered))
    if not found.states:
        return Claim(None, reason=found.reason, recovered=recovered)
    return _Batch(context, line, run, policy, lease, resolver_of(_head(context, line))).claim(found)


def _again(context: SweepContext, record: RunRecord) -> Claim:
    status = context.runs.status(record.run)
    if status in ENDED:
        raise ConflictError(f"run {record.run} has ended", f"it is {status}", "start a new run")
    context.runs.start(record, context.actor)
    return Claim(record, _uri(context, record.run), "claimed before")


def _head(context: SweepContext, line: str) -> Version:
    head = read_head(context.store, line)
    if head is None:
        raise UsageError(f"model line {line} has no HEAD", "nothing was published", "use `salun model import`")
    return Version(head[0].version, read_version(context.store, line, head[0].version))


def _uri(context: SweepContext, run: str) -> str:
    return f"{context.store.uri}/{scratch_key(run, FORGET_FILE)}"


class _Batch:
    """Claims the requests of one batch."""

    def __init__(
        self, context: SweepContext, line: str, run: str, policy: SweepPolicy, lease: Lease, resolver: Resolver
    ) -> None:
        self.context, self.line, self.run, self.policy = context, line, run, policy
        self.lease, self.resolver = lease, resolver
        self.nothing: list[tuple[RequestState, Resolved]] = []
        self.refused: list[str] = []

    def claim(self, found: Found) -> Claim:
        """Sort the requests out, put those of the batch in progress, and record the run."""
        chosen = self._choose(self._not_erased_yet(found.states))
        moved = in_parallel(lambda item: self._take(*item), chosen)
        taken = [item for item in moved if item is not None]
        for state, resolved in self.nothing:
            self._settle_nothing(state, resolved)
        settled = tuple(state.request.id for state, _ in self.nothing)
        outcome = Claim(None, "", found.reason, settled, tuple(self.refused), found.recovered)
        if not taken:
            return replace(outcome, reason="nothing of what was asked is left to erase" if settled else found.reason)
        data = self.resolver.freeze_forget_set([state.request for state, _ in taken])
        record = self._record(taken, kind_of(found.states[0]), sha256_bytes(data))
        self.context.store.put_new(scratch_key(self.run, FORGET_FILE), data)
        self.context.runs.start(record, self.context.actor)
        return replace(outcome, record=record, forget_uri=_uri(self.context, self.run))

    def _not_erased_yet(self, states: Sequence[RequestState]) -> list[RequestState]:
        """Complete what an earlier run published after it was given up for dead, and return the rest."""
        tried = in_parallel(self._earlier_runs, states)
        runs = {run for names in tried for run in names}
        records = [record for run in runs if (record := self.context.runs.read(run)) is not None]
        late = {record.run: (record, version) for record in records if (version := published_by(self.context, record))}
        rest = []
        for state, names in zip(states, tried, strict=True):
            record, version = next((late[run] for run in names if run in late), (None, None))
            member = next((item for item in record.members if item.id == state.request.id), None) if record else None
            if member is None or version is None:
                rest.append(state)
            elif (taken := self._take(state, Resolved((), member.forget_digest, member.named))) is not None:
                complete(self.context, taken[0], member, version, record)
        return rest

    def _earlier_runs(self, state: RequestState) -> list[str]:
        """Return the runs that had a request since it was last completed: any of them may have published late."""
        if state.last is None or state.last.n < 3:  # no run has given it back yet
            return []
        runs: list[str] = []
        for event in self.context.ledger.events(state.request.id):
            runs = [] if event.to_status is Status.COMPLETED else [*runs, event.run or ""]
        return [run for run in dict.fromkeys(runs) if run not in {"", self.run}]

    def _choose(self, states: Sequence[RequestState]) -> list[tuple[RequestState, Resolved]]:
        """Take requests as long as the run stays within its bounds; the first one always."""
        chosen: list[tuple[RequestState, Resolved]] = []
        together: set[str] = set()
        for state in states:
            resolved = self._resolve(state)
            if resolved is None:
                continue
            if not resolved.ids:
                self.nothing.append((state, resolved))
                continue
            larger = together | resolved.samples
            if chosen and len(larger) > self.policy.max_forget_fraction * self.resolver.train_count:
                continue
            chosen.append((state, resolved))
            together = larger
            if len(chosen) == self.policy.max_requests:
                break
        return chosen

    def _resolve(self, state: RequestState) -> Resolved | None:
        """Find what a request names; one that cannot be resolved becomes a dead letter, and its error says no name."""
        try:
            resolved = self.resolver.resolve(state.request)
            if not resolved.samples or len(resolved.samples) < self.resolver.train_count:
                return resolved
            reason = "it names all of the training data"
        except SalunError as error:
            reason = f"what it names cannot be resolved ({type(error).__name__})"
        with suppress(ConflictError):  # somebody held or withdrew it in this moment
            self.context.ledger.move(state, Transition(Status.FAILED, self.context.actor, reason))
            self.refused.append(state.request.id)
        return None

    def _take(self, state: RequestState, resolved: Resolved) -> tuple[RequestState, Resolved] | None:
        """Put a request in progress; None where somebody held or withdrew it in this moment."""
        if state.status is Status.IN_PROGRESS:
            return state, resolved
        group, rung = kind_of(state)
        actor, epoch = self.context.actor, self.lease.epoch
        try:
            event = self.context.ledger.move(
                state, Transition(Status.IN_PROGRESS, actor, "claimed", self.run, epoch=epoch, level=rung, group=group)
            )
        except ConflictError:
            return None
        return RequestState(request=state.request, last=event), resolved

    def _settle_nothing(self, state: RequestState, resolved: Resolved) -> None:
        taken = self._take(state, resolved)
        if taken is not None:
            version = Version(self.resolver.version, read_version(self.context.store, self.line, self.resolver.version))
            complete(self.context, taken[0], _member(*taken), version, None)

    def _record(
        self, taken: Sequence[tuple[RequestState, Resolved]], kind: tuple[str | None, int], sealed: str
    ) -> RunRecord:
        group, rung = kind
        ids = sorted({name for _, resolved in taken for name in resolved.ids})
        samples = {sample for _, resolved in taken for sample in resolved.samples}
        rung = self._rung(ids, len(samples), rung)
        recipe = self.policy.recipes[rung]
        fields = {
            "run": self.run,
            "line": self.line,
            "parent": self.resolver.version,
            "epoch": self.lease.epoch,
            "created_at": as_utc(self.context.clock()).isoformat(),
            **recipe.model_dump(),
            "seed": self.policy.seed,
            "rung": rung,
            "group": group,
            "work_key": self._work(ids, rung),
            "members": [_member(state, resolved).model_dump() for state, resolved in taken],
            "forget_sha256": sealed,
            "forget_count": len(ids),
            "train_count": self.resolver.train_count,
        }
        return parse(RunRecord, fields, f"run {self.run}")

    def _rung(self, ids: Sequence[str], samples: int, rung: int) -> int:
        """Return the recipe to try: the last one where a single request is beyond the bound, else one not refused yet.

        The very same work would be refused again; only the last recipe is repeated, for then a person asked for it.
        """
        last = len(self.policy.recipes) - 1
        if samples > self.policy.max_forget_fraction * self.resolver.train_count:
            return last
        rung = min(rung, last)
        while rung < last and self.context.store.get(work_key(self._work(ids, rung))) is not None:
            rung += 1
        return rung

    def _work(self, ids: Sequence[str], rung: int) -> str:
        work = {
            "line": self.line,
            "parent": self.resolver.version,
            "forget": ids,
            "recipe": self.policy.recipes[rung].model_dump(mode="json"),
            "seed": self.policy.seed,
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
