"""Structured logs on standard error, redacted: JSON in a cluster, readable lines on a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from salun_core.errors import unknown_name

MASK = "[redacted]"
# what a request names, and what opens doors; compared in snake_case
_PERSONAL = frozenset(
    {
        "id_list",
        "ids",
        "sample_id",
        "sample_ids",
        "subject",
        "subject_id",
        "subject_ids",
        "subject_ref",
        "subject_refs",
        "subjects",
        "prompt",
        "prompts",
        "anchor_prompt",
        "anchor_prompts",
    }
)
_SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|passphrase|authorization|credential|cookie)s?(_|$)"
    r"|aws_.*key|(^|_)(access|api|private|signing)_key(_|$)"
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_IN_TEXT = (
    (re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b"), MASK),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {MASK}"),
    (re.compile(r"(?i)\b(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+"), rf"\1{MASK}"),
    (re.compile(r"(://)[^/\s@:]+:[^/\s@]+@"), rf"\1{MASK}@"),
    (
        re.compile(
            r"(?i)\b((?:[a-z0-9]+_)*(?:secret|password|passwd|token|access_key)(?:_[a-z]+)*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]{4,}"
        ),
        rf"\1{MASK}",
    ),
)
# an AWS secret key is 40 characters of base64; a commit of 40 hex digits is none
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+=])(?=[A-Za-z0-9/+]*[A-Z])(?=[A-Za-z0-9/+]*[a-z])(?=[A-Za-z0-9/+]*[0-9])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)


def is_denied(key: str) -> bool:
    """Return whether the value under a key must not be logged."""
    plain = _HUMP.sub("_", key).lower().replace("-", "_").replace(" ", "_")
    return plain in _PERSONAL or _SECRET.search(plain) is not None


def redact(value: Any) -> Any:  # noqa: ANN401 - whatever is logged
    """Return a copy of a value with denied keys and secrets in texts masked, at any depth.

    Args:
        value: text, number, mapping, sequence or any object; an object is replaced by its `repr`.

    Returns:
        Plain data that is fit to be logged.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: MASK if is_denied(str(key)) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    return redact_text(str(value) if isinstance(value, str | os.PathLike) else repr(value))


def redact_text(text: str) -> str:
    """Return a text with secrets in it masked."""
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return _AWS_SECRET.sub(MASK, text)


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
