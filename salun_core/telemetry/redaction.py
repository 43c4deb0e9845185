"""Keeps people and secrets out of the logs: some keys are masked, and some patterns inside any text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

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
