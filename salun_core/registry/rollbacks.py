"""The record of a rollback, one for each version that it undid, so that the history of a line keeps its reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from salun_core.config import Document, parse
from salun_core.digest import canonical_json
from salun_core.errors import ConflictError
from salun_core.registry.lookup import ancestry, read_version
from salun_core.storage.documents import Digest, LineId, ShortText, Text, UtcTime, parse_stored
from salun_core.storage.keys import version_key, version_rollback_key, versions_prefix
from salun_core.storage.objects import ObjectStore


class VersionRollback(Document):
    """Why a version is not in use any more. It is valid only while the version is no ancestor of HEAD."""

    format: Literal["salun.version-rollback/v1"] = "salun.version-rollback/v1"
    line: LineId = Field(description="the model line")
    version: Digest = Field(description="the version that was undone")
    to: Digest = Field(description="the version that became HEAD again")
    by: ShortText = Field(description="who rolled the line back")
    at: UtcTime = Field(description="when, ISO 8601 in UTC")
    reason: Text = Field(description="why; no personal data")


def new_rollback(
    line: str, version: str, to: str, by: str, reason: str, clock: Callable[[], datetime]
) -> VersionRollback:
    """Build the record of a rollback from one version (a digest) to another; the reason must hold no personal data."""
    fields = {"line": line, "version": version, "to": to, "by": by, "reason": reason}
    at = clock().astimezone(UTC).isoformat()
    return parse(VersionRollback, {**fields, "at": at}, f"rollback of {line}@{version[:12]}")


def record_rollback(store: ObjectStore, record: VersionRollback) -> None:
    """Write the record of a rollback; it replaces that of an earlier attempt, which did not move HEAD.

    ConflictError if another rollback of the line is being recorded.
    """
    read_version(store, record.line, record.version)
    key, data = version_rollback_key(record.line, record.version), canonical_json(record.model_dump(mode="json"))
    with contextlib.suppress(ConflictError):
        store.put_new(key, data)
        return
    stored = store.get(key)
    if stored is None:
        store.put_new(key, data)
    else:
        store.put_if(key, data, stored.etag)


def read_rollback(store: ObjectStore, line: str, digest: str) -> VersionRollback | None:
    """Return the record of the rollback that undid a version, or None."""
    key = version_rollback_key(line, digest)
    stored = store.get(key)
    return parse_stored(VersionRollback, stored.data, key) if stored else None


def versions_in_use(store: ObjectStore, line: str) -> frozenset[str] | None:
    """Return the versions that HEAD is made from; None if no version of the line lies outside of them.

    The lineage decides, as in `undoing`: a rollback may lack its record.
    """
    listed = {found["digest"] for entry in store.list(versions_prefix(line)) if (found := version_key.match(entry.key))}
    in_use = frozenset(item.digest for item in ancestry(store, line))
    return None if listed <= in_use else in_use


def undoing(store: ObjectStore, line: str, digest: str) -> str:
    """Return when, by whom and why a version that was published was undone; empty if HEAD is made from it.

    The lineage decides: a record without a rollback has no effect, and a version outside of the lineage is not in use
    although no record says why.
    """
    if digest in {item.digest for item in ancestry(store, line)}:
        return ""
    record = read_rollback(store, line, digest)
    if record is None:
        return "is not in the lineage of HEAD, and no rollback of it is recorded"
    at = record.at[:16].replace("T", " ")
    return f"was rolled back on {at} UTC by {record.by} to {record.to[:12]}: {record.reason}"
