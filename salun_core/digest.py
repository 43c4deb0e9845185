"""SHA-256 digests of bytes, files and canonical JSON (RFC 8785); always 64 lower-case hex digits."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import Any

import rfc8785

from salun_core.errors import IntegrityError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex, without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hmac_file(path: Path, key: bytes) -> str:
    """Return the HMAC-SHA256 of a file's content, in hex: a digest that tells nothing without the key."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hmac.new(key, digestmod="sha256")).hexdigest()


def canonical_json(document: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Return the canonical form (RFC 8785) of a JSON document; raises IntegrityError for NaN, infinity or a set."""
    try:
        return rfc8785.dumps(document)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise IntegrityError(
            "document has no canonical form", str(error), "remove NaN, infinity and non-JSON values"
        ) from error


def canonical_texts(rows: list[list[str | int]]) -> bytes:
    """Return the canonical form (RFC 8785) of rows of texts and small integers, four times as fast as for any JSON.

    Raises IntegrityError if a text stands for bytes that are not UTF-8.
    """
    try:
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise IntegrityError("document has no canonical form", str(error), "rename what is not UTF-8") from error


def hex_digests(data: bytes) -> list[str]:
    """Return SHA-256 digests, which lie one after another, in hex."""
    text = data.hex()
    return [text[start : start + 64] for start in range(0, len(text), 64)]


def digest_json(document: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return the SHA-256 of a document's canonical form, in hex."""
    return sha256_bytes(canonical_json(document))


def is_digest(text: str) -> bool:
    """Return whether a text is a SHA-256 in lower-case hex."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(what: str, expected: str, actual: str) -> None:
    """Raise IntegrityError if two digests differ."""
    if expected != actual:
        raise IntegrityError(
            f"{what} does not match its digest",
            f"expected {expected[:12]}…, found {actual[:12]}…",
            "fetch it again (a model: salun model pull LINE --out DIR); if it still differs, the copy there is damaged",
        )
