"""Holds that keep a superseded version, and the records of versions whose weights were deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal, TypeVar

from pydantic import Field

from salun_core.config import Document, parse
from salun_core.digest import canonical_json
from salun_core.errors import ConflictError, UsageError
from salun_core.registry.lookup import missing_files, read_version
from salun_core.storage.documents import Count, Digest, FileName, LineId, ShortText, Text, UtcTime, parse_stored
from salun_core.storage.keys import version_disposal_key, version_hold_key, version_holds_prefix
from salun_core.storage.objects import ObjectStore


class VersionHold(Document):
    """While it exists, the files of a version are not purged."""

    format: Literal["salun.version-hold/v1"] = "salun.version-hold/v1"
    line: LineId = Field(description="the model line")
    version: Digest = Field(description="the version that is kept")
    by: ShortText = Field(description="who wants it kept")
    at: UtcTime = Field(description="since when, ISO 8601 in UTC")
    reason: Text = Field(description="why; no personal data")


class VersionDisposal(Document):
    """Which files of a version were deleted for good; its manifest, evidence, decision and report stay."""

    format: Literal["salun.version-disposal/v1"] = "salun.version-disposal/v1"
    line: LineId = Field(description="the model line")
    version: Digest = Field(description="the version")
    files: list[FileName] = Field(description="names of its files that were erased, with all their S3 versions")
    size: Count = Field(description="their size together, in bytes")
    at: UtcTime = Field(description="when the last of them was gone, ISO 8601 in UTC")
    by: ShortText = Field(description="who erased them")
    reason: Text = Field(description="by which rule")


D = TypeVar("D", bound=Document)


def hold_version(
    store: ObjectStore, line: str, digest: str, by: str, reason: str, clock: Callable[[], datetime]
) -> VersionHold:
    """Keep a version from being purged; an existing hold stays as it is.

    The hold is written first and the files are checked afterwards: a purge that looks later sees the hold and puts back
    what it deleted, and what one deleted before it looked is missing here (see `retention.purge`). ConflictError if the
    weights were deleted already, or are being deleted.
    """
    manifest = read_version(store, line, digest)
    disposal = read_disposal(store, line, digest)
    if disposal:
        raise ConflictError(
            f"{line}@{digest[:12]} cannot be held",
            f"its weights were deleted at {disposal.at}",
            "hold a version before its retention ends",
        )
    fields = {"line": line, "version": digest, "by": by, "reason": reason, "at": clock().astimezone(UTC).isoformat()}
    key, ours = version_hold_key(line, digest), parse(VersionHold, fields, f"hold of {line}@{digest[:12]}")
    hold = _create(store, key, ours)
    gone = missing_files(store, manifest)
    if gone:
        if hold == ours:
            store.delete(key)
        raise ConflictError(
            f"{line}@{digest[:12]} cannot be held",
            f"{', '.join(gone)} of it is missing; a purge may be deleting it",
            "hold a version before its retention ends",
        )
    return hold


def release_version(store: ObjectStore, line: str, digest: str) -> VersionHold:
    """Delete the hold of a version, and return it: the next purge treats the version like any other."""
    hold = _read(store, version_hold_key(line, digest), VersionHold)
    if hold is None:
        held = ", ".join(item.version[:12] for item in holds(store, line)) or "none"
        raise UsageError(f"{line}@{digest[:12]} is not held", f"held versions of the line: {held}", "name one of them")
    store.delete(version_hold_key(line, digest))
    return hold


def holds(store: ObjectStore, line: str) -> Sequence[VersionHold]:
    """Return the holds of a line, sorted by version."""
    found = (_read(store, entry.key, VersionHold) for entry in store.list(version_holds_prefix(line)))
    return [hold for hold in found if hold]


def record_disposal(store: ObjectStore, disposal: VersionDisposal) -> VersionDisposal:
    """Record that files of a version are gone, and return the record; the first record of a version stands."""
    return _create(store, version_disposal_key(disposal.line, disposal.version), disposal)


def read_disposal(store: ObjectStore, line: str, digest: str) -> VersionDisposal | None:
    """Return the record of which files of a version were deleted, or None."""
    return _read(store, version_disposal_key(line, digest), VersionDisposal)


def _create(store: ObjectStore, key: str, document: D) -> D:
    """Store a document, unless there is one already, and return what is stored."""
    with contextlib.suppress(ConflictError):
        store.put_new(key, canonical_json(document.model_dump(mode="json")))
    return _read(store, key, type(document)) or document


def _read(store: ObjectStore, key: str, kind: type[D]) -> D | None:
    stored = store.get(key)
    return parse_stored(kind, stored.data, key) if stored else None
