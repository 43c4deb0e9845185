"""Reads model lines: HEAD, versions by digest or prefix, and the ancestry of HEAD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from salun_core.digest import check_digest, is_digest, sha256_bytes
from salun_core.errors import IntegrityError, UsageError, unknown_name
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.storage.blobs import blob_size
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import blob_key, check_id, head_key, version_key, versions_prefix
from salun_core.storage.objects import ObjectStore

_MIN_PREFIX = 6


@dataclass(frozen=True)
class Version:
    """A version of a line: its digest and its manifest."""

    digest: str
    manifest: VersionManifest


def read_head(store: ObjectStore, line: str) -> tuple[Head, str] | None:
    """Return HEAD of a line and its etag, or None if the line has no HEAD."""
    key = head_key(line)
    stored = store.get(key)
    if stored is None:
        return None
    head = parse_stored(Head, stored.data, key)
    _check_line(key, line, head.line)
    return head, stored.etag


def require_head(store: ObjectStore, line: str) -> Head:
    """Return HEAD of a line; UsageError if the line has none."""
    found = read_head(store, line)
    if found is None:
        raise no_head(line)
    return found[0]


def no_head(line: str) -> UsageError:
    """Return the error for a line without HEAD."""
    remedy = "import or train a model: `salun model import`"
    return UsageError(f"model line {line} has no HEAD", "no version was published", remedy)


def read_version(store: ObjectStore, line: str, digest: str) -> VersionManifest:
    """Return the manifest of a version; its digest is verified before it is parsed.

    UsageError if the line has no such version.
    """
    key = version_key(line, digest)
    stored = store.get(key)
    if stored is None:
        raise _unknown_version(line, digest[:12])
    check_digest(f"manifest of {line}@{digest[:12]}", digest, sha256_bytes(stored.data))
    manifest = parse_stored(VersionManifest, stored.data, key)
    _check_line(key, line, manifest.line)
    return manifest


def _unknown_version(line: str, version: str) -> UsageError:
    remedy = f"choose one that `salun model history {line}` shows"
    return UsageError(f"{line}@{version} does not exist", "the line has no such version", remedy)


def unknown_line(line: str, known: Sequence[str]) -> UsageError:
    """Return the error for a model line that does not exist; if the store has no lines, the remedy is to begin one."""
    if known:
        return unknown_name("model line", line, known)
    remedy = f"begin it: salun model import CHECKPOINT --line {line} --out DIR, or salun train with --line {line}"
    return UsageError(f"unknown model line {line!r}", "the store has no model line yet", remedy)


def _check_line(key: str, expected: str, actual: str) -> None:
    if expected != actual:
        raise IntegrityError(f"{key} belongs to line {actual!r}", "it was copied or moved", "restore the right one")


def read_file(store: ObjectStore, version: Version, name: str) -> bytes:
    """Return a small file of a version; IntegrityError if it is missing or does not match its digest."""
    digest, what = version.manifest.files[name].sha256, f"{name} of version {version.digest[:12]}"
    stored = store.get(blob_key(digest))
    if stored is None:
        raise IntegrityError(f"{what} is missing", "its blob was deleted", "restore it from a copy")
    check_digest(what, digest, sha256_bytes(stored.data))
    return stored.data


def resolve(store: ObjectStore, reference: str) -> tuple[str, str]:
    """Resolve `line`, `line@HEAD` or `line@<digest or its first 6 or more digits>` to the line and the digest.

    UsageError if the prefix is ambiguous, or if the line (the nearest is named) or version does not exist.
    """
    line, _, version = reference.partition("@")
    check_id("model line", line)
    if version in {"", "HEAD"}:
        found = read_head(store, line)
        if found is None:
            raise unknown_line(line, lines(store))
        return line, found[0].version
    if len(version) < _MIN_PREFIX or not is_digest(version.ljust(64, "0")):
        raise UsageError(
            f"{version[:80]!r} is not a version",
            "a version is HEAD or 6 to 64 lower-case hex digits of its digest",
            f"try {line}@HEAD",
        )
    start = versions_prefix(line)
    keys = [entry.key for entry in store.list(start + version) if entry.key.endswith("/manifest.json")]
    digests = [key[len(start) :].partition("/")[0] for key in keys]
    if len(digests) == 1:
        return line, digests[0]
    if digests:
        some = ", ".join(digest[:12] for digest in digests[:4])
        raise UsageError(f"{line}@{version} is ambiguous", f"it may be {some}", "give more digits")
    known = lines(store)
    raise _unknown_version(line, version) if line in known else unknown_line(line, known)


def lines(store: ObjectStore) -> list[str]:
    """Return the lines that have a HEAD, sorted."""
    found = (head_key.match(entry.key) for entry in store.list("lines/"))
    return sorted(values["line"] for values in found if values)


def manifests(store: ObjectStore, line: str) -> list[Version]:
    """Return every version of a line that has a manifest, also those that were undone or never published."""
    found = (version_key.match(entry.key) for entry in store.list(versions_prefix(line)))
    return [Version(item["digest"], read_version(store, line, item["digest"])) for item in found if item]


def ancestry(store: ObjectStore, line: str, start: str | None = None) -> list[Version]:
    """Return a version of a line, by default HEAD, and its ancestors, the newest first.

    IntegrityError if a manifest on the way is damaged or missing; UsageError if the line does not exist.
    """
    digest: str | None = start or resolve(store, line)[1]
    versions: list[Version] = []
    while digest is not None:
        try:
            manifest = read_version(store, line, digest)
        except UsageError as error:
            raise IntegrityError(
                f"the lineage of {line} is broken at {digest[:12]}",
                "that manifest is missing",
                "restore it from a copy",
            ) from error
        versions.append(Version(digest, manifest))
        digest = manifest.parent
    return versions


def missing_files(store: ObjectStore, manifest: VersionManifest) -> list[str]:
    """Return the names of a version's files that are not stored with their size, sorted."""
    return [name for name, entry in sorted(manifest.files.items()) if blob_size(store, entry.sha256) != entry.size]
