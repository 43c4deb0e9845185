"""Logs: JSON lines in a cluster, readable lines on a terminal, always to standard error and redacted."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from salun_core.errors import unknown_name
from salun_core.telemetry.redaction import redact

FORMAT_VARIABLE = "SALUN_LOG"
RUN_VARIABLE = "SALUN_RUN_ID"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logging(json: bool | None = None, level: str = "info") -> None:
    """Set up the logs of this process, those of libraries included.

    Args:
        json: JSON lines or readable ones; None asks `SALUN_LOG` (`json` or `text`), then whether standard error
            is a terminal.
        level: `debug`, `info`, `warning` or `error`; libraries stay at `warning` unless it is `debug`.

    Raises:
        UsageError: an unknown level.
    """
    if level.lower() not in LEVELS:
        raise unknown_name("log level", level, LEVELS)
    threshold, as_json = LEVELS[level.lower()], _wants_json(json)
    structlog.configure(
        processors=[*_shared(), *_ending(as_json)],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    _configure_libraries(as_json, threshold)


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; where nothing set up the logs it does so with the defaults."""
    if not structlog.is_configured():
        configure_logging()
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


@contextmanager
def run_bound(run_id: str | None) -> Iterator[None]:
    """Put a run's id on every line that is logged inside the block, by libraries too.

    Threads that the block starts do not inherit it; `contextvars.copy_context` gives it to them.

    Args:
        run_id: the id; empty or None leaves the lines with what an outer block or `SALUN_RUN_ID` says.
    """
    with structlog.contextvars.bound_contextvars(**({"run": run_id} if run_id else {})):
        yield


def _wants_json(json: bool | None) -> bool:
    if json is not None:
        return json
    wish = os.environ.get(FORMAT_VARIABLE, "").lower()
    return wish == "json" or (wish != "text" and not sys.stderr.isatty())


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        _add_run,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _add_run(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Give a line the run of its pod, where no step said which run it works for."""
    if "run" not in event and (run := os.environ.get(RUN_VARIABLE)):
        event["run"] = run
    return event


def _ending(as_json: bool) -> list[Processor]:
    """Tracebacks become text before the redaction, so that none escapes it."""
    human = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    last: Processor = structlog.processors.JSONRenderer(ensure_ascii=False) if as_json else human
    return [structlog.processors.format_exc_info, _redact_event, last]


def _redact_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    safe: dict[str, Any] = redact(event)
    return safe


def _configure_libraries(as_json: bool, threshold: int) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_shared(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_ending(as_json)],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(threshold if threshold in (logging.DEBUG, logging.ERROR) else logging.WARNING)
