"""Times a step, logs its start and end, and pushes its metrics whether it succeeds or fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from salun_core.telemetry.logs import get_logger
from salun_core.telemetry.push import StepMetrics


@contextmanager
def observed(step: str, model_line: str) -> Iterator[StepMetrics]:
    """Observe one step.

    Args:
        step: its name.
        model_line: the line it works on.

    Yields:
        The step's metrics, to record values in.
    """
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
