"""Observes a step: its start, end and failure in the log, its duration and values pushed as metrics in any case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from salun_core.telemetry.logs import get_logger, run_bound
from salun_core.telemetry.push import StepMetrics


@contextmanager
def observed(step: str, model_line: str, run: str = "") -> Iterator[StepMetrics]:
    """Observe one step and yield its metrics, to record values in; its log lines carry the id of the run."""
    with run_bound(run or None):
        metrics, log = StepMetrics(), get_logger()
        log.info("step_started", step=step, model_line=model_line)
        try:
            yield metrics
        except BaseException as error:
            log.error("step_failed", step=step, model_line=model_line, error=type(error).__name__)
            metrics.push(step, model_line, succeeded=False)
            raise
        log.info("step_finished", step=step, model_line=model_line)
        metrics.push(step, model_line)
