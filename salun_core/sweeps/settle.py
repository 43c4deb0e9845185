"""Settles a run: completes its requests if it published a version, and queues them again if it did not.

The store decides, not what the run reports: did the run publish a version in the line's lineage? What else is needed
stands in the run's record, so that settling depends on no configuration. Any process may settle a run, also while
another one does, and every step may be repeated. The order of the writes is:

1. Published: for each request its certificate, then its event `completed`, then its redaction.
   Not published: if the gate refused, a note that this work was refused, with the causes; then for each request an
   event that queues it again or lets it fail. If no recipe can help, a second event holds the request for a person.
2. The event that ends the run. A later settle reports the status of this event, whatever was published meanwhile.
3. The run's scratch files are deleted, and the lease is released.

Failures and what follows from them:

- The process dies after a certificate: the next settle keeps it and writes the event (see `certificates.issue`).
- It dies after an event `completed`: the request counts as done, and `salun purge` redacts it.
- It dies after the note: the next settle reads the same decision and plans the same. The note of another settle stays.
- It dies between the two events of a request that is held: the next settle of the run writes the second. If none comes
  before the next claim, the request is tried again, is refused again, and is held then.
- It dies elsewhere: the next settle finds the remaining requests in progress and continues. A sweep of the same line
  settles dead runs first (`recover`).
- It stalls while others settle and claim: its events are refused, since their numbers are taken.
- The run publishes after it was settled as failed: `advance` of its log stops it. If it had passed that check before,
  the next claim finds the version (`claim._Batch._without_erased`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from salun_core.certificates.issue import CertificateInput
from salun_core.errors import ConflictError, IntegrityError
from salun_core.gate import DECISION, Cause, GateDecision
from salun_core.registry.lookup import Version, read_file, read_head, read_version
from salun_core.requests.ledger import Transition
from salun_core.requests.redaction import redact_request
from salun_core.requests.schema import Outcome, RequestState, Status
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import run_key, scratch_prefix, work_key
from salun_core.storage.leases import read_lease, release
from salun_core.storage.objects import ObjectStore
from salun_core.sweeps.context import SweepContext, in_parallel
from salun_core.sweeps.policy import Next, Refused, after_failure, after_interruption, after_refusal
from salun_core.sweeps.runs import ENDED, RunMember, RunRecord, RunStatus
from salun_core.telemetry.logs import get_logger
from salun_core.times import as_utc

_REASONS = {
    RunStatus.PUBLISHED: "published",
    RunStatus.GATE_REFUSED: "the gate refused",
    RunStatus.STALE_PARENT: "another version was published meanwhile",
    RunStatus.FAILED: "ended without a verdict",
}
_UNDONE = "its version was rolled back"
_FINITE = "weights finite"  # the gate's check; without finite weights most metrics are not a number


@dataclass(frozen=True)
class Settled:
    """How a run ended.

    Args:
        status: its last status; None if it had claimed nothing.
        version: the version that it published.
        completed: requests that it erased.
        failed: requests that a person must look at.
        held: requests that are on hold for review, since no recipe can help.
        next: what comes after a refusal, and why.
    """

    run: str
    status: RunStatus | None = None
    version: str | None = None
    completed: Sequence[str] = ()
    queued: Sequence[str] = ()
    failed: Sequence[str] = ()
    held: Sequence[str] = ()
    next: str = ""


def settle(context: SweepContext, line: str, run: str, *, keep_scratch: bool = False) -> Settled:
    """Settle a run, delete its scratch files, and release the lease. Repeating it gives the same answer.

    `keep_scratch` leaves the files to a later call: the step that settles may be repeated, and reads them. SalunError
    if a certificate cannot be issued: no request is completed without one, and settling again continues.
    """
    record = context.runs.read(run)
    settled = _settle_unrecorded(context, line, run) if record is None else _settle_recorded(context, record)
    for entry in () if keep_scratch else context.store.list(scratch_prefix(run)):
        context.store.delete(entry.key)
    release(context.store, line, run)
    return settled


def recover(context: SweepContext, line: str, run: str) -> list[str]:
    """Settle the dead runs of a line: those with requests in progress, and the one that the lease was taken from.

    The caller holds the lease, so no other run is alive. The last holder may have settled its requests and died before
    it ended its log or deleted its scratch files, which hold what is to be forgotten. Returns the requests that were in
    progress for other runs.
    """
    others: dict[str, list[str]] = {}
    for state in in_progress(context, line):
        if state.last and state.last.run and state.last.run != run:
            others.setdefault(state.last.run, []).append(state.request.id)
    lease = read_lease(context.store, line)
    if lease is not None and lease.taken_from:
        others.setdefault(lease.taken_from, [])
    for other in others:
        settle(context, line, other)
    return [request for requests in others.values() for request in requests]


def in_progress(context: SweepContext, line: str, run: str | None = None) -> list[RequestState]:
    """Return the requests of a line that are in progress, for one run or for any."""
    states = context.ledger.list(line, [Status.IN_PROGRESS])
    return [state for state in states if run is None or (state.last and state.last.run == run)]


def _settle_unrecorded(context: SweepContext, line: str, run: str) -> Settled:
    """Queue the requests of a run that died before its record was written: they were not tried, so none is given up."""
    states = in_progress(context, line, run)
    plan = {
        state.request.id: Next(False, state.last.rung, state.last.group, "the run never began")
        for state in states
        if state.last
    }
    return _requeue(context, run, None, states, plan)


def _settle_recorded(context: SweepContext, record: RunRecord) -> Settled:
    # The members are read before HEAD: their events are then refused if the run publishes and is settled meanwhile.
    members = in_parallel(lambda member: context.ledger.state(member.id), record.members)
    ours = [state for state in members if state.last and state.last.run == record.run]
    states = [state for state in ours if state.status is Status.IN_PROGRESS]
    # So is the log: a run moves HEAD before it records that it published, so a version that is missing was rolled back.
    ended = _ended(context, record.run)
    version = published_by(context, record)
    if version is not None:
        found = {member.id: member for member in record.members}
        decision = decision_about(context.store, version) if states else None
        in_parallel(lambda state: complete(context, state, found[state.request.id], version, record, decision), states)
        status, names = RunStatus.PUBLISHED, [state.request.id for state in states]
        settled = Settled(record.run, ended or status, version.digest, names)
    else:
        refused = refusal_of(context, record.run)
        status = ended or _verdict(context, record, refused)
        refused = refused or Refused()  # the decision of a run that ended so may be gone
        if status is RunStatus.GATE_REFUSED and refused.review is None:
            note = {"format": "salun.work/v1", "causes": sorted(refused.causes)}
            with suppress(ConflictError):  # noted before, perhaps with other causes
                context.store.put_new(work_key(record.work_key), json.dumps(note).encode())
        half_held = [state for state in ours if state.status is Status.QUEUED and refused.review]
        plan = _plan(record, status, [*states, *half_held], refused)
        settled = _requeue(context, record.run, status, states, plan)
        if status is RunStatus.GATE_REFUSED:
            finished = _hold_for_review(context, record.run, half_held, plan)
            ours = [state for state in ours if state.request.id not in finished]
            settled = replace(settled, held=[*settled.held, *finished], next=_next(record, refused))
    if ended is None:
        try:
            context.runs.advance(record.run, status, context.actor, _REASONS[status])
        except ConflictError:  # it ended meanwhile, by its own step or by another settle: that stays
            settled = replace(settled, status=_ended(context, record.run))
        except IntegrityError:  # no reason to leave the requests in progress
            get_logger().warning("run_log_damaged", run=record.run)
    return _with_earlier(settled, ours)


def _ended(context: SweepContext, run: str) -> RunStatus | None:
    """Return the status with which a run has ended; None if it has not, or if its log is damaged."""
    try:
        status = context.runs.status(run)
    except IntegrityError:  # the store decides about the requests, with or without a log
        return None
    return status if status in ENDED else None


def _with_earlier(settled: Settled, ours: Sequence[RequestState]) -> Settled:
    """Add the requests that an earlier settle of the run moved, and that nobody moved since."""
    earlier = {
        status: [state.request.id for state in ours if state.status is status]
        for status in (Status.COMPLETED, Status.QUEUED, Status.FAILED, Status.ON_HOLD)
    }
    return replace(
        settled,
        completed=[*settled.completed, *earlier[Status.COMPLETED]],
        queued=[*settled.queued, *earlier[Status.QUEUED]],
        failed=[*settled.failed, *earlier[Status.FAILED]],
        held=[*settled.held, *earlier[Status.ON_HOLD]],
    )


def _verdict(context: SweepContext, record: RunRecord, refused: Refused | None) -> RunStatus:
    """Return how a run ended that has no version in the lineage, as the store shows it."""
    if refused is not None:
        return RunStatus.GATE_REFUSED
    head = read_head(context.store, record.line)
    stale = head is None or head[0].version != record.parent
    return RunStatus.STALE_PARENT if stale else RunStatus.FAILED


def _plan(record: RunRecord, status: RunStatus, states: Sequence[RequestState], refused: Refused) -> Mapping[str, Next]:
    """Return what follows for the requests that are still in progress for a run."""
    attempts = {state.request.id: state.last.attempt for state in states if state.last}
    if status is RunStatus.GATE_REFUSED:
        return after_refusal(attempts, record.run, record.rung, record.limits, refused, record.tried or ())
    if status is RunStatus.FAILED:
        return after_failure(attempts, record.run, record.rung, record.group, record.limits)
    reason = _UNDONE if status is RunStatus.PUBLISHED else _REASONS[status]
    return after_interruption(attempts, record.rung, record.group, reason, record.limits)


def published_by(context: SweepContext, record: RunRecord) -> Version | None:
    """Return the version that a run published, or None.

    A version that forgot another set than the run claimed is not the run's: its requests are queued again and erased by
    a later run. Certifying them would fail, and the failure would stop every later sweep of the line.

    It looks from HEAD back to the run's parent. After a rollback the parent may be missing there; then it stops at the
    first version that is older than the run.
    """
    head = read_head(context.store, record.line)
    digest = head[0].version if head else None
    while digest is not None and digest != record.parent:
        manifest = read_version(context.store, record.line, digest)
        if manifest.run == record.run:
            if manifest.forget_set_digest in (None, record.forget_sha256):
                return Version(digest, manifest)
            get_logger().warning("version_of_another_forget_set", run=record.run, version=digest)
        digest = None if manifest.created_at < record.created_at else manifest.parent
    return None


def _next(record: RunRecord, refused: Refused) -> str:
    """Return what comes after a refusal, and why, as the events of its requests tell it."""
    members = {member.id: member.attempt for member in record.members}
    plan = after_refusal(members, record.run, record.rung, record.limits, refused, record.tried or ())
    return next(iter(plan.values())).reason


def refusal_of(context: SweepContext, run: str) -> Refused | None:
    """Return why the gate refused a run, or None if it left no refusal: then the gate did not refuse it.

    A damaged decision counts as none, since it must not keep the requests in progress: they are tried again.
    """
    key = run_key(run, DECISION)
    stored = context.store.get(key)
    try:
        decision = parse_stored(GateDecision, stored.data, key) if stored else None
    except IntegrityError:
        return None
    if decision is None or decision.passed:
        return None
    if any(verdict.rule == _FINITE and not verdict.passed for verdict in decision.verdicts):
        return Refused(frozenset({Cause.DAMAGED}))  # the other rules fail since nothing can be measured
    advice = {refusal.cause: refusal.next for refusal in reversed(decision.refusals)}  # of the first rule
    return Refused(frozenset(advice), advice)


def _requeue(
    context: SweepContext, run: str, status: RunStatus | None, states: Sequence[RequestState], plan: Mapping[str, Next]
) -> Settled:
    def move(state: RequestState) -> None:
        step = plan[state.request.id]
        to = Status.FAILED if step.give_up else Status.QUEUED
        epoch = state.last.epoch if state.last else None
        transition = Transition(
            to, context.actor, step.reason, run, epoch=epoch, level=step.level, group=step.group, tried=step.tried
        )
        with suppress(ConflictError):  # a twin of this call was faster
            event = context.ledger.move(state, transition)
            _hold_for_review(context, run, [RequestState(request=state.request, last=event)], plan)

    in_parallel(move, states)
    names = [state.request.id for state in states]
    failed = [name for name in names if plan[name].give_up]
    held = [name for name in names if plan[name].review]
    queued = [name for name in names if name not in failed and name not in held]
    return Settled(run, status, queued=queued, failed=failed, held=held)


def _hold_for_review(
    context: SweepContext, run: str, states: Sequence[RequestState], plan: Mapping[str, Next]
) -> list[str]:
    """Put the queued requests of a plan on hold that need a person, and return them."""
    held = []
    for state in states:
        step = plan[state.request.id]
        if step.review is not None:
            with suppress(ConflictError):  # a twin of this call was faster, or a person moved it
                context.ledger.move(
                    state, Transition(Status.ON_HOLD, context.actor, step.reason, run, outcome=step.review)
                )
            held.append(state.request.id)
    return held


def decision_about(store: ObjectStore, version: Version) -> GateDecision | None:
    """Return the gate's decision about a version; None if the version has none."""
    if DECISION not in version.manifest.files:
        return None
    return parse_stored(GateDecision, read_file(store, version, DECISION), DECISION)


def complete(
    context: SweepContext,
    state: RequestState,
    member: RunMember,
    version: Version,
    record: RunRecord | None,
    decision: GateDecision | None = None,
) -> None:
    """Certify one request, complete it, and redact it; it stays in progress if the certificate cannot be issued.

    `version` has forgotten it, or was searched: `record` is None if there was nothing to erase.
    """
    outcome, reason = Outcome.NOTHING_TO_ERASE, "nothing that it names was trained on"
    if record is not None:
        outcome, reason = Outcome.RETRAINED if version.manifest.retrained else Outcome.UNLEARNED, "published"
    facts = CertificateInput(
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
        requests=len(record.members) if record else None,
    )
    context.certifier.certify(facts)
    assert state.last is not None
    run = record.run if record else state.last.run  # the run that erased it, which may not be the one that claims now
    epoch = record.epoch if record else state.last.epoch
    with suppress(ConflictError):  # a twin of this call was faster
        done = Transition(Status.COMPLETED, context.actor, reason, run, outcome, epoch)
        context.ledger.move(state, replace(done, assurance=facts.assurance(decision)))
    redact_request(context.store, state.request.id, keep_hashes=True)
