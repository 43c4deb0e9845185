"""Times a step, logs its start and end, records where its run stands, and pushes its metrics in any case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun_core.errors import SalunError
from salun_core.storage import open_store
from salun_core.storage.leases import read_lease, renew
from salun_core.sweeps.runs import RunLog, RunStatus
from salun_core.telemetry.logs import get_logger, run_bound
from salun_core.telemetry.metrics import METHOD_LABELS
from salun_core.telemetry.push import StepMetrics
from salun_core.times import utc_clock

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Evidence
    from salun_core.gate import GateDecision

_BEGUN = {
    "compute_mask": RunStatus.MASKING,
    "unlearn": RunStatus.UNLEARNING,
    "evaluate": RunStatus.EVALUATING,
}


@dataclass(frozen=True)
class RunRef:
    """A run of the deletion ledger that a step belongs to; either part is empty where there is none.

    Args:
        store_uri: `s3://bucket/prefix`.
        run: id of the run.
    """

    store_uri: str = ""
    run: str = ""

    def advance(self, to: RunStatus, step: str) -> None:
        """Record that the run came further, and renew its lease; a run that no request asked for has neither.

        Raises:
            ConflictError: the run has ended: another settled it, and what it makes is not wanted any more.
        """
        if not (self.store_uri and self.run):
            return
        log = RunLog(store := open_store(self.store_uri), utc_clock)
        log.advance(self.run, to, step, f"{step} began")
        record = log.read(self.run)
        with suppress(SalunError):  # a lease saves work; that the line stays right does not rest on it
            lease = read_lease(store, record.line) if record else None
            if lease is not None and (lease.holder, lease.released) == (self.run, False):
                renew(store, lease)


@contextmanager
def observed(step: str, model_line: str, run: RunRef | None = None) -> Iterator[StepMetrics]:
    """Observe one step.

    Args:
        step: its name.
        model_line: the line it works on.
        run: the run that it belongs to; every line that is logged meanwhile carries its id.

    Yields:
        The step's metrics, to record values in.
    """
    with run_bound(run.run if run else None):
        metrics, log = StepMetrics(), get_logger()
        log.info("step_started", step=step, model_line=model_line)
        try:
            if run and step in _BEGUN:
                run.advance(_BEGUN[step], step)
            yield metrics
        except BaseException as error:
            log.error("step_failed", step=step, model_line=model_line, error=type(error).__name__)
            metrics.push(step, model_line, succeeded=False)
            raise
        log.info("step_finished", step=step, model_line=model_line)
        metrics.push(step, model_line)


def record_evidence(metrics: StepMetrics, evidence: Evidence, decision: GateDecision | None = None) -> None:
    """Set the metrics that evidence and the gate's decision give.

    Args:
        metrics: of the step.
        evidence: the measured shares; a missing one is left out.
        decision: the gate's decision, if there is one.
    """
    label = evidence.run.method if evidence.run.method in METHOD_LABELS else "other"  # plug-ins have other names

    def after(name: str) -> float | None:
        return evidence.metrics[name].after if name in evidence.metrics else None

    wrong = after("UA")
    metrics.record("salun_forget_accuracy_ratio", None if wrong is None else 1.0 - wrong, method=label)
    metrics.record("salun_retain_accuracy_ratio", after("RA"), method=label)
    metrics.record("salun_test_accuracy_ratio", after("TA"), method=label)
    metrics.record("salun_membership_attack_ratio", after("MIA"), method=label)
    metrics.record("salun_mask_density_ratio", evidence.run.density, method=label)
    metrics.record("salun_gate_passed", None if decision is None else float(decision.passed), method=label)
