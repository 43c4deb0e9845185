"""Holds that keep a superseded version, and the records of versions whose weights were disposed of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from salun_core.config import Document, parse
from salun_core.digest import canonical_json
from salun_core.errors import ConflictError, UsageError
from salun_core.registry.lookup import read_version
from salun_core.storage.documents import Count, Digest, FileName, LineId, ShortText, Text, UtcTime, parse_stored
from salun_core.storage.keys import version_disposal_key, version_hold_key
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
    """What of a version is gone for good; its manifest, evidence, decision and report stay."""

    format: Literal["salun.version-disposal/v1"] = "salun.version-disposal/v1"
    line: LineId = Field(description="the model line")
    version: Digest = Field(description="the version")
    files: list[FileName] = Field(description="names of its files that were erased, with all their S3 versions")
    size: Count = Field(description="their size together, in bytes")
    at: UtcTime = Field(description="when the last of them was gone, ISO 8601 in UTC")
    by: ShortText = Field(description="who erased them")
    reason: Text = Field(description="by which rule")

    def canonical(self) -> bytes:
        """Return the bytes that are stored."""
        return canonical_json(self.model_dump(mode="json"))


def hold_version(
    store: ObjectStore, line: str, digest: str, by: str, reason: str, clock: Callable[[], datetime]
) -> VersionHold:
    """Keep a version from being purged; a hold that is there already stays as it is.

    Args:
        store: where the line lies.
        line: the model line.
        digest: the version.
        by: who wants it kept.
        reason: why, without personal data.
        clock: gives the time now.

    Returns:
        The hold.

    Raises:
        UsageError: there is no such version, or a text is not plain.
        ConflictError: its weights were disposed of already.
    """
    read_version(store, line, digest)
    disposal = read_disposal(store, line, digest)
    if disposal:
        raise ConflictError(
            f"{line}@{digest[:12]} cannot be held",
            f"its weights were disposed of at {disposal.at}",
            "hold a version before its retention ends",
        )
    fields = {"line": line, "version": digest, "by": by, "reason": reason, "at": clock().astimezone(UTC).isoformat()}
    hold = parse(VersionHold, fields, f"the hold of {line}@{digest[:12]}")
    with contextlib.suppress(ConflictError):
        store.put_new(version_hold_key(line, digest), canonical_json(hold.model_dump(mode="json")))
    return read_hold(store, line, digest) or hold


def release_version(store: ObjectStore, line: str, digest: str) -> VersionHold:
    """Give up the hold of a version: the next purge treats it like any other.

    Returns:
        The hold that was given up.

    Raises:
        UsageError: the version is not held.
    """
    hold = read_hold(store, line, digest)
    if hold is None:
        held = ", ".join(item.version[:12] for item in holds(store, line)) or "none"
        raise UsageError(f"{line}@{digest[:12]} is not held", f"held versions of the line: {held}", "name one of these")
    store.delete(version_hold_key(line, digest))
    return hold


def read_hold(store: ObjectStore, line: str, digest: str) -> VersionHold | None:
    """Return the hold of a version, or None.

    Raises:
        IntegrityError: the document is damaged.
    """
    key = version_hold_key(line, digest)
    stored = store.get(key)
    return parse_stored(VersionHold, stored.data, key) if stored else None


def holds(store: ObjectStore, line: str) -> Sequence[VersionHold]:
    """Return the holds of a line, sorted by version.

    Raises:
        IntegrityError: a document is damaged.
    """
    folder = version_hold_key(line, "0" * 64).rpartition("/")[0]
    found = [(entry.key, store.get(entry.key)) for entry in store.list(f"{folder}/")]
    return [parse_stored(VersionHold, stored.data, key) for key, stored in found if stored]


def record_disposal(store: ObjectStore, disposal: VersionDisposal) -> VersionDisposal:
    """Record that files of a version are gone; the first record of a version stands.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    with contextlib.suppress(ConflictError):
        store.put_new(version_disposal_key(disposal.line, disposal.version), disposal.canonical())
    return read_disposal(store, disposal.line, disposal.version) or disposal


def read_disposal(store: ObjectStore, line: str, digest: str) -> VersionDisposal | None:
    """Return the record of what of a version was disposed of, or None.

    Raises:
        IntegrityError: the document is damaged.
    """
    key = version_disposal_key(line, digest)
    stored = store.get(key)
    return parse_stored(VersionDisposal, stored.data, key) if stored else None
