"""Field types that stored documents share, and how a stored document is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

from salun_core.config import Document, parse, unique_keys
from salun_core.digest import is_digest
from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.storage.keys import check_id, check_relative_name, check_tree

T = TypeVar("T")
D = TypeVar("D", bound=Document)


def _valid(check: Callable[[T], object], value: T) -> T:
    """Run a check of `keys` as a pydantic validator, which reports faults as ValueError."""
    try:
        check(value)
    except UsageError as error:
        raise ValueError(f"{error.what}: {error.why}") from error
    return value


def _valid_digest(text: str) -> str:
    if not is_digest(text):
        raise ValueError("a digest is 64 lower-case hex digits")
    return text


def _valid_time(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != UTC.utcoffset(None):
        raise ValueError("a time is in UTC, such as 2026-01-31T12:00:00+00:00")
    return text


def valid_tree(names: Collection[str]) -> None:
    """Check, in a pydantic validator, that files of these names can lie in one folder: no name is also a folder."""
    _valid(check_tree, names)


Digest = Annotated[str, AfterValidator(_valid_digest)]
LineId = Annotated[str, AfterValidator(partial(_valid, partial(check_id, "model line")))]
RunId = Annotated[str, AfterValidator(partial(_valid, partial(check_id, "run")))]
FileName = Annotated[str, AfterValidator(partial(_valid, check_relative_name))]
UtcTime = Annotated[str, AfterValidator(_valid_time)]
Count = Annotated[int, Field(ge=0, strict=True, le=2**53 - 1)]  # JSON numbers are exact up to 2**53
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f]+$"  # one line, and no control character that a terminal would obey
ShortText = Annotated[str, Field(max_length=128, pattern=_PLAIN)]
Text = Annotated[str, Field(max_length=500, pattern=_PLAIN)]


def one_line(text: str) -> str:
    """Return a text as a `Text`: one line of at most 500 characters, without those that a terminal obeys."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:500]


def parse_stored(kind: type[D], data: bytes, source: str) -> D:
    """Read a document that came out of the store; faults raise IntegrityError, which names `source`, its key."""
    try:
        return parse(kind, json.loads(data, object_pairs_hook=unique_keys), source)
    except SalunError as error:
        raise IntegrityError(error.what, error.why, "the document in the store is damaged: restore it") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{source} is not valid JSON", str(error)[:200], "restore it from a copy") from error
