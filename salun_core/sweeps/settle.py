"""Settles a run: completes its requests when it was published, and queues them again when it was not.

What counts is what the store shows: a version of the run in the line's lineage, or none. Events are written after
what they tell of, and every step may be repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from salun_core.certificates.issue import CertificateInput
from salun_core.errors import ConflictError, SalunError
from salun_core.registry.lookup import Version, read_head, read_version
from salun_core.requests.ledger import Transition
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import Outcome, RequestState, Status
from salun_core.storage.keys import run_key, scratch_prefix, work_key
from salun_core.storage.leases import release
from salun_core.sweeps.context import SweepContext, in_parallel
from salun_core.sweeps.policy import Next, SweepPolicy, after_failure, after_refusal, after_stale
from salun_core.sweeps.runs import RunMember, RunRecord, RunStatus
from salun_core.times import as_utc

DECISION = "decision.json"  # a refused run keeps the gate's answer under this name


@dataclass(frozen=True)
class Settled:
    """What became of a run.

    Args:
        run: its id.
        status: how it ended; None where it had claimed nothing.
        version: what it published.
        completed: requests that it erased.
        queued: requests that try again.
        failed: dead letters.
    """

    run: str
    status: RunStatus | None = None
    version: str | None = None
    completed: Sequence[str] = ()
    queued: Sequence[str] = ()
    failed: Sequence[str] = ()


def settle(context: SweepContext, line: str, run: str, policy: SweepPolicy) -> Settled:
    """Settle a run, remove its scratch files, and give the lease back.

    Args:
        context: where requests and runs are recorded.
        line: the model line.
        run: the run; one that claimed nothing is no error.
        policy: of the sweep.

    Returns:
        What became of it.

    Raises:
        SalunError: a certificate cannot be issued; nothing was completed that has none, and settling again goes on.
    """
    settled = _settle(context, line, run, policy)
    for entry in context.store.list(scratch_prefix(run)):
        context.store.delete(entry.key)
    release(context.store, line, run)
    return settled


def recover(context: SweepContext, line: str, run: str, policy: SweepPolicy) -> list[str]:
    """Settle what dead runs left: whoever holds the lease may.

    Returns:
        The requests that were found in progress under other runs, or had been erased by one that was settled too early.
    """
    found = []
    others: dict[str, list[str]] = {}
    for state in context.ledger.list(line, [Status.IN_PROGRESS]):
        if state.last and state.last.run and state.last.run != run:
            others.setdefault(state.last.run, []).append(state.request.id)
    for other, requests in others.items():
        settle(context, line, other, policy)
        found += requests
    return found


def _settle(context: SweepContext, line: str, run: str, policy: SweepPolicy) -> Settled:
    record = context.runs.read(run)
    if record is None:  # claimed and killed before the run was recorded: it never began
        left = [s for s in context.ledger.list(line, [Status.IN_PROGRESS]) if s.last and s.last.run == run]
        plan = after_stale(_attempts(left), 0, None, policy) if left else {}
        return _requeue(context, run, None, left, {name: _unbegun(step, left) for name, step in plan.items()})
    states = _members(context, record)
    version = published_by(context, record)
    if version is not None:
        completed = in_parallel(lambda state: _complete(context, state, record, version), states)
        _end(context, run, RunStatus.PUBLISHED, "published")
        return Settled(run, RunStatus.PUBLISHED, version.digest, completed=completed)
    status, plan = _unpublished(context, record, states, policy)
    settled = _requeue(context, run, status, states, plan)
    _end(context, run, status, _REASONS[status])
    return settled


_REASONS = {
    RunStatus.GATE_REFUSED: "the gate refused",
    RunStatus.STALE_PARENT: "another version was published meanwhile",
    RunStatus.FAILED: "ended without a verdict",
}


def _members(context: SweepContext, record: RunRecord) -> list[RequestState]:
    """Return the members that are still in this run's hands."""
    states = in_parallel(lambda member: context.ledger.state(member.id), record.members)
    return [s for s in states if s.status is Status.IN_PROGRESS and s.last and s.last.run == record.run]


def published_by(context: SweepContext, record: RunRecord) -> Version | None:
    """Find what a run published: a version of it between HEAD and its parent. None where there is none."""
    for version in _since(context, record.line, record.parent, record.created_at):
        if version.manifest.run == record.run:
            return version
    return None


def _since(context: SweepContext, line: str, parent: str, created_at: str) -> Iterator[Version]:
    """Yield the versions from HEAD back to a parent; after a rollback as far as any can be younger than the run."""
    head = read_head(context.store, line)
    digest = head[0].version if head else None
    while digest is not None and digest != parent:
        manifest = read_version(context.store, line, digest)
        yield Version(digest, manifest)
        if manifest.created_at < created_at:
            return
        digest = manifest.parent


def _unpublished(
    context: SweepContext, record: RunRecord, states: Sequence[RequestState], policy: SweepPolicy
) -> tuple[RunStatus, Mapping[str, Next]]:
    attempts = _attempts(states)
    if _refused(context, record.run):
        context.store.put_new(work_key(record.work_key), json.dumps({"format": "salun.work/v1"}).encode())
        plan = after_refusal(attempts, record.run, record.rung, policy) if attempts else {}
        return RunStatus.GATE_REFUSED, plan
    head = read_head(context.store, record.line)
    if head is None or head[0].version != record.parent:
        return RunStatus.STALE_PARENT, after_stale(attempts, record.rung, record.group, policy)
    plan = after_failure(attempts, record.run, record.rung, record.group, policy) if attempts else {}
    return RunStatus.FAILED, plan


def _refused(context: SweepContext, run: str) -> bool:
    """Return whether the gate refused the run: it left its decision."""
    stored = context.store.get(run_key(run, DECISION))
    if stored is None:
        return False
    try:
        decision = json.loads(stored.data)
        return isinstance(decision, dict) and decision.get("passed") is False
    except ValueError:
        return False


def _attempts(states: Sequence[RequestState]) -> dict[str, int]:
    return {state.request.id: state.last.attempt for state in states if state.last}


def _unbegun(step: Next, left: Sequence[RequestState]) -> Next:
    """Keep recipe and half of a request whose run never began."""
    last = next(iter(left)).last
    rung, group = (last.rung, last.group) if last else (0, None)
    return Next(step.give_up, rung, group, "the run never began")


def _requeue(
    context: SweepContext, run: str, status: RunStatus | None, states: Sequence[RequestState], plan: Mapping[str, Next]
) -> Settled:
    def move(state: RequestState) -> bool:
        step = plan[state.request.id]
        to = Status.FAILED if step.give_up else Status.QUEUED
        epoch = state.last.epoch if state.last else None
        with suppress(ConflictError):  # a twin of this call was first
            context.ledger.move(
                state, Transition(to, context.actor, step.reason, run, epoch=epoch, level=step.rung, group=step.group)
            )
        return step.give_up

    gave_up = in_parallel(move, states)
    names = [state.request.id for state in states]
    failed = [name for name, given in zip(names, gave_up, strict=True) if given]
    return Settled(run, status, queued=[name for name in names if name not in failed], failed=failed)


def _complete(context: SweepContext, state: RequestState, record: RunRecord, version: Version) -> str:
    member = next(member for member in record.members if member.id == state.request.id)
    complete(context, state, member, version, record)
    return state.request.id


def complete(
    context: SweepContext, state: RequestState, member: RunMember, version: Version, record: RunRecord | None
) -> None:
    """Certify one request, complete it, and take what it names out of the store.

    Args:
        context: where requests and runs are recorded.
        state: the request, in progress.
        member: what the run knew of it.
        version: what has forgotten it, or was searched.
        record: the run; None where there was nothing to erase.

    Raises:
        SalunError: the certificate cannot be issued; the request stays in progress.
    """
    outcome = Outcome.NOTHING_TO_ERASE
    if record is not None:
        outcome = Outcome.RETRAINED if version.manifest.retrained else Outcome.UNLEARNED
    context.certifier.certify(
        CertificateInput(
            request=state.request,
            outcome=outcome,
            completed_at=as_utc(context.clock()).isoformat(),
            version=version,
            forget_digest=member.forget_digest,
            salt=member.salt,
            found=member.found,
            named=member.named,
            attempt=member.attempt,
            level=record.rung if record else 0,
            run=record.run if record else None,
            epoch=record.epoch if record else None,
            frozen_digest=record.forget_sha256 if record else None,
        )
    )
    assert state.last is not None
    reason = "published" if record else "nothing that it names was trained on"
    run = record.run if record else state.last.run  # what erased it, which need not be what found out
    epoch = record.epoch if record else state.last.epoch
    with suppress(ConflictError):  # a twin of this call was first
        context.ledger.move(state, Transition(Status.COMPLETED, context.actor, reason, run, outcome, epoch=epoch))
    redact_request(context.store, state.request.id, keep_hashes=True)


def _end(context: SweepContext, run: str, status: RunStatus, reason: str) -> None:
    """Record how a run ended; one that ended otherwise by its own word keeps that."""
    with suppress(SalunError):
        context.runs.advance(run, status, context.actor, reason)
