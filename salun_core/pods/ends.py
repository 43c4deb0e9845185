"""The steps of a run that need no tensors: the purge beside it, settling and concluding after it.

They import no torch, so that a pod of them takes a second of processor time and little memory: a sweep that finds
nothing to do consists of such steps but for its claim.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

from salun_core.certificates.keys import find_signing_key
from salun_core.errors import SalunError
from salun_core.gate import DECISION, GateDecision
from salun_core.pods.pod import Pod, end_process, patiently
from salun_core.registry.lookup import Version, read_version
from salun_core.steps.outcome import OutcomeRecord, RunState, add_counts, read_outcome, write_outcome
from salun_core.steps.purge import purge_store as purge_step
from salun_core.steps.settle import settle_requests
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import run_key
from salun_core.sweeps.failed_pods import Cause, why_killed
from salun_core.sweeps.runs import RunStatus
from salun_core.sweeps.settle import Settled, decision_about

_UNKNOWN = Cause(
    "out of memory, evicted, over its time limit, or the run was terminated",
    "give more memory or another node in the run form, then submit a new run",
)


def purge(store_uri: str, run: str, *, dry_run: bool) -> tuple[int, str]:
    """Purge a store, and return how many objects were deleted and what was wrong.

    A purge that must not delete (no signing key, a damaged document) does not stop the sweep beside it: erasing goes
    on, and the metric of the step reports the failure.
    """
    try:
        key = find_signing_key()
        report = purge_step(store_uri, dry_run=dry_run, signer=key, run=run)
    except SalunError as error:
        told = str(error.for_pods())
        print(f"Error: {told}", file=sys.stderr, flush=True)
        return 0, told
    return report.total.keys, ""


def settle(pod: Pod, state: str, message: str) -> Settled:
    """Settle a run after its steps, in any case, and write its outcome if no step did.

    A step that was killed (out of memory, evicted, over its time limit) writes nothing; this step names it, with the
    reason that the Workflow gives in `message`, or the likely ones. `state` is Kubeflow's.
    """

    def attempt() -> Settled:
        settled = settle_requests(pod.store_uri, pod.model_line, pod.run)
        counts = counts_of(settled)
        there = read_outcome(pod.store, pod.run)
        if there is None or not there.final:
            write_outcome(pod.store, _ended_outcome(pod, settled, there, state, message))
        add_counts(pod.store, pod.run, **counts)
        return settled

    return patiently(pod, "settle_requests", attempt)


def counts_of(settled: Settled) -> dict[str, int]:
    """Return how many requests ended in which way, as `add_counts` takes them."""
    person = len(settled.failed) + len(settled.held)  # both wait for a person
    return {"completed": len(settled.completed), "queued": len(settled.queued), "failed": person}


def _ended_outcome(pod: Pod, settled: Settled, there: OutcomeRecord | None, state: str, message: str) -> OutcomeRecord:
    """Return the outcome of a run whose steps ended without a verdict."""
    if verdict := verdict_of(pod, settled):
        return verdict
    step = there.step if there else ""
    if there is not None and there.fault:
        return pod.outcome(RunState.FAILED, there.text, next="correct it, then submit a new run", step=step)
    if state == "SUCCEEDED":  # no step of ours ends so: its outcome was deleted, or an artifact was changed
        advice = "submit a new run"
        return pod.outcome(RunState.FAILED, "the steps ended without a verdict", next=advice, step=step)
    what = f"{step} was killed" if step else "the run ended before its first step began"
    cause = why_killed(step) or (replace(_UNKNOWN, text=message) if message else _UNKNOWN)
    advice = f"{cause.advice}; Retry of this one does nothing"
    return pod.outcome(RunState.KILLED, f"{what}: {cause.text}", next=advice, step=step)


def verdict_of(pod: Pod, settled: Settled) -> OutcomeRecord | None:
    """Return the outcome of a run that published or was refused before its step was killed, or None."""
    version = settled.version
    with suppress(SalunError):  # the line does not exist, or is damaged: the exit handler must not end by that
        version = version or pod.published()  # a run without requests has no record
    if version:
        return published_outcome(pod, version)
    if settled.status is RunStatus.GATE_REFUSED:
        text, advice = "the gate refused the model", "see the report"
        with suppress(SalunError):  # damaged
            key = run_key(pod.run, DECISION)
            stored = pod.store.get(key)
            decision = parse_stored(GateDecision, stored.data, key) if stored else None
            text, advice = (f"{text}: {decision.summary}", decision.next or advice) if decision else (text, advice)
        advice = f"{settled.next or 'the next sweep tries another recipe, if there is one'}; or {advice}"
        return pod.outcome(RunState.REFUSED, text, next=advice, step="gate_publish", report=pod.report_address())
    return None


def published_outcome(pod: Pod, version: str) -> OutcomeRecord:
    """Return the outcome of a run that moved HEAD to a version."""
    text, assurance = f"published {pod.model_line}@{version[:12]}", None
    with suppress(SalunError):  # the exit handler must not end by a damaged version: its requests are not settled then
        found = Version(version, read_version(pod.store, pod.model_line, version))
        decision = decision_about(pod.store, found)
        assurance = decision.assurance() if decision else None
    fields: dict[str, Any] = {"assurance": assurance.model_dump(mode="json", exclude_none=True)} if assurance else {}
    fields |= {"step": "gate_publish", "version": version, "report": pod.report_address()}
    return pod.outcome(RunState.PUBLISHED, text, **fields)


def conclude(pod: Pod) -> None:
    """Print the run's outcome in one line, and end the process with its exit code if it is bad.

    It is the last step: decision and report are registered before it, because Kubeflow drops the artifacts of a step
    that fails. It may be repeated: it only reads.
    """
    outcome = patiently(pod, "conclude", lambda: read_outcome(pod.store, pod.run))
    if outcome is None or not outcome.final:  # never green without a verdict
        end_process(
            pod, "conclude", SalunError(f"run {pod.run} has no outcome", "no step wrote one", "submit a new run")
        )
    advice = f". To fix it: {outcome.next}" if outcome.next else ""
    print(f"{'Error: ' if outcome.code else ''}{outcome.text}{advice}", file=sys.stderr, flush=True)
    if outcome.code:
        raise SystemExit(outcome.code)
