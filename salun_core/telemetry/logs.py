"""Structured logs on standard error, redacted: JSON in a cluster, readable lines on a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from salun_core.errors import escaped, unknown_name

MASK = "[redacted]"
# keys of what a request names, and of secrets, in snake_case
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
    # a signed header can be replayed for 15 minutes: `Authorization: AWS4-HMAC-SHA256 …, Signature=…`
    (re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*b?[\"']?)AWS4[^\"'\n}]*"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b(signature[=:]\s*)[0-9a-f%/+=]{16,}"), rf"\1{MASK}"),
    (re.compile(r"(://)[^/\s@:]+:[^/\s@]+@"), rf"\1{MASK}@"),
    (
        re.compile(
            r"(?i)\b((?:[a-z0-9]+_)*(?:secret|password|passwd|token|access_key)(?:_[a-z]+)*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]{4,}"
        ),
        rf"\1{MASK}",
    ),
)
# an AWS secret key is 40 characters of base64 with letters of both cases; a commit has 40 lower-case hex digits
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+=])(?=[A-Za-z0-9/+]*[A-Z])(?=[A-Za-z0-9/+]*[a-z])(?=[A-Za-z0-9/+]*[0-9])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)


def is_denied(key: str) -> bool:
    """Return whether the value under a key must not be logged."""
    plain = _HUMP.sub("_", key).lower().replace("-", "_").replace(" ", "_")
    return plain in _PERSONAL or _SECRET.search(plain) is not None


def redact(value: Any) -> Any:  # noqa: ANN401 - any logged value
    """Return a copy of a value with denied keys and secrets in texts masked, at any depth.

    An object that is no text, number, mapping or sequence is replaced by its `repr`.
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


def configure_logging(json: bool | None = None, level: str = "info", libraries: bool = True) -> None:
    """Set up the logs of this process; libraries log warnings and errors only.

    `json` None lets `SALUN_LOG` decide (`json` or `text`); if it is not set, a terminal gets readable lines. With
    `libraries` False, Python's own loggers stay as the program set them.
    """
    if level.lower() not in LEVELS:
        raise unknown_name("log level", level, LEVELS)
    wish = os.environ.get(FORMAT_VARIABLE, "").lower()
    as_json = json if json is not None else wish == "json" or (wish != "text" and not sys.stderr.isatty())
    threshold = LEVELS[level.lower()]
    structlog.configure(
        processors=[*_shared(), *_ending(as_json)],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    if not libraries:
        return
    handler = logging.StreamHandler(sys.stderr)  # for libraries, which log to `logging`
    handler.setLevel(max(threshold, logging.WARNING))  # also for a library whose own logger was set to debug
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_ending(as_json)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(threshold, logging.WARNING))  # an S3 client alone logs thousands of lines at debug


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; if nobody called `configure_logging`, call it with the defaults."""
    if not structlog.is_configured():
        configure_logging()
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def described(error: BaseException) -> dict[str, str]:
    """Return an exception as fields of a log line: its type and where it was raised, without its message.

    The message of an unexpected error may hold any value that the code worked on, such as the sample id of a KeyError.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    cause = error.__cause__ or error.__context__
    before = {"cause": type(cause).__name__} if cause is not None else {}
    return {"error": type(error).__name__, "traceback": frames, **before}


@contextmanager
def run_bound(run_id: str | None) -> Iterator[None]:
    """Put a run's id on every line that is logged inside the block, also by libraries.

    Threads started in the block do not inherit it; start them with `contextvars.copy_context`. If the id is empty or
    None, that of an outer block or of `SALUN_RUN_ID` stays.
    """
    with structlog.contextvars.bound_contextvars(**({"run": run_id} if run_id else {})):
        yield


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        _add_run,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _add_run(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add the run of the pod (`SALUN_RUN_ID`), unless `run_bound` set one."""
    if "run" not in event and (run := os.environ.get(RUN_VARIABLE)):
        event["run"] = run
    return event


def _ending(as_json: bool) -> list[Processor]:
    """Return the last processors; tracebacks become text before the redaction, so that it covers them."""
    human = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    last: Processor = structlog.processors.JSONRenderer(ensure_ascii=False) if as_json else human
    return [structlog.processors.format_exc_info, _redact_event, *([] if as_json else [_escape_event]), last]


def _escape_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: escaped(value) if isinstance(value, str) else value for name, value in event.items()}


def _redact_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    safe: dict[str, Any] = redact(event)
    return safe
