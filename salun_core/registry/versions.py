"""Stages, publishes, rolls back and fetches model versions.

A publish writes in this order: blobs, manifest, HEAD. What a kill leaves:

- after some blobs: files that no manifest names. They are invisible; a purge deletes them after a day. A retry
  finds them by their digest and does not send them again.
- after the manifest (create-only, its key is its digest): a staged version. It is invisible too, because readers start
  at HEAD. A retry with the same `created_at` gives the same digest; any other leaves a version that a purge deletes.
- after HEAD: the version is published. A retry returns the same HEAD.

A purge may delete, at any time, a file that no version needed when it looked. So the files are checked after the
manifest is written and again after HEAD moved; the other half of that protocol is in `retention.purge`.

HEAD moves by compare-and-swap: the etag that was read must still be the store's, and the version that HEAD names must
be the parent of the new version. The etag alone is not enough, since a worker that started from an old parent may read
HEAD late: its version would bring back what was forgotten since. After a lost swap HEAD is read again:

- it is the version itself: another process of the same run published it;
- the version is an ancestor of HEAD: the swap was done, its reply was lost, and a child was published since;
- else another version won, and the caller gets a ConflictError and starts again from HEAD.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from salun_core.config import parse
from salun_core.digest import sha256_file
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.registry.holds import read_disposal
from salun_core.registry.lookup import Version, ancestry, missing_files, read_head, read_version
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.storage.blobs import fetch_blob, put_blob
from salun_core.storage.keys import check_relative_name, head_key, version_key
from salun_core.storage.local_files import disk_error, list_tree
from salun_core.storage.objects import FileStore, ObjectStore
from salun_core.times import utc_now


def stage_version(
    store: FileStore, fields: Mapping[str, Any], files: Mapping[str, Path]
) -> tuple[str, VersionManifest]:
    """Upload the files of a version, then its manifest; it stays invisible until it is published.

    `fields` are those of `VersionManifest` except `files`; `created_at` is now by default. UsageError if a field or a
    file name is wrong; nothing was uploaded then.
    """
    fields = {"created_at": utc_now(), **fields}
    for name in files:
        check_relative_name(name)
    blank = {name: {"sha256": "0" * 64, "size": 0} for name in files}
    parse(VersionManifest, {**fields, "files": blank}, "version manifest")
    blobs = {name: put_blob(store, path) for name, path in files.items()}
    entries = {name: {"sha256": blob.sha256, "size": blob.size} for name, blob in blobs.items()}
    manifest = parse(VersionManifest, {**fields, "files": entries}, "version manifest")
    store.put_new(version_key(manifest.line, manifest.digest), manifest.canonical())
    return manifest.digest, manifest


def publish_head(
    store: FileStore,
    line: str,
    version: str,
    parent: str | None,
    run: str | None,
    files: Mapping[str, Path] | None = None,
) -> Head:
    """Make a staged version the HEAD of its line, if HEAD is still its parent (else ConflictError). It may be repeated.

    `parent` is None for the first version of a line. `files` are uploaded again if a purge deleted them; without
    `files` the call fails then.
    """
    manifest = read_version(store, line, version)
    if manifest.parent != parent:
        raise UsageError(
            f"{line}@{version[:12]} was not made from {_short(parent)}",
            f"its parent is {_short(manifest.parent)}",
            "publish it with its own parent",
        )
    _complete(store, manifest, files)
    found = read_head(store, line)
    if found and found[0].version == version:
        return found[0]
    _check_parent(line, found[0].version if found else None, parent)
    head = _next_head(line, version, found[0].sequence if found else 0, run)
    head = _swap(store, head, parent, found[1] if found else None)
    _complete(store, manifest, files)
    return head


def _next_head(line: str, version: str, sequence: int, run: str | None) -> Head:
    fields = {"line": line, "version": version, "sequence": sequence + 1, "published_at": utc_now(), "run": run}
    return parse(Head, fields, "HEAD")


def _complete(store: FileStore, manifest: VersionManifest, files: Mapping[str, Path] | None) -> None:
    """Check that a version's files and manifest are stored, and upload again what is not.

    Before the swap: the manifest is written, so a purge that looks from now on keeps its files; this finds what one
    deleted before it looked. After the swap: a publisher that was suspended before the swap, until a purge took its
    version for abandoned, finds here what it lacks. Killed between the two, it leaves a HEAD without files, which the
    exporter reports; the version's files are then in no store, and HEAD must be rolled back.
    """
    gone = missing_files(store, manifest)
    if gone and files:
        for name in gone:
            put_blob(store, files[name])
        gone = missing_files(store, manifest)
    if gone:
        raise IntegrityError(
            f"{gone[0]} of {manifest.line}@{manifest.digest[:12]} is missing from the store or has another size",
            "it was deleted or damaged after it was staged",
            "stage the version again",
        )
    if files and store.get(version_key(manifest.line, manifest.digest)) is None:
        store.put_new(version_key(manifest.line, manifest.digest), manifest.canonical())


def _check_parent(line: str, actual: str | None, parent: str | None) -> None:
    if actual != parent:
        raise ConflictError(
            f"stale parent: HEAD of {line} is {_short(actual)}, not {_short(parent)}",
            "another version was published meanwhile",
            "start again from HEAD; publishing this would bring back what was forgotten since",
        )


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "nothing"


def _swap(store: ObjectStore, head: Head, parent: str | None, etag: str | None) -> Head:
    data, key = head.model_dump_json().encode(), head_key(head.line)
    try:
        if etag is None:
            store.put_new(key, data)
        else:
            store.put_if(key, data, etag)
    except ConflictError:
        moved = read_head(store, head.line)
        actual = moved[0].version if moved else None
        if moved and actual == head.version:
            return moved[0]
        if moved and any(past.digest == head.version for past in ancestry(store, head.line)):
            return head
        _check_parent(head.line, actual, parent)
        raise
    return head


def publish(store: FileStore, fields: Mapping[str, Any], files: Mapping[str, Path]) -> tuple[Head, VersionManifest]:
    """Stage a version and make it HEAD; ConflictError if HEAD is not the parent that `fields` names."""
    digest, manifest = stage_version(store, fields, files)
    return publish_head(store, manifest.line, digest, manifest.parent, manifest.run, files), manifest


def undone_by(store: ObjectStore, line: str, version: str) -> Sequence[Version]:
    """Return the versions that a rollback to an earlier version would undo, the newest first.

    UsageError if the version is HEAD, or not an ancestor of HEAD.
    """
    past = ancestry(store, line)
    place = next((index for index, item in enumerate(past) if item.digest == version), None)
    if not place:
        why = "it is HEAD" if place == 0 else f"it is not among the {len(past)} versions that HEAD came from"
        raise UsageError(f"cannot roll {line} back to {version[:12]}", why, f"see `salun model history {line}`")
    return past[:place]


def roll_back(store: ObjectStore, line: str, version: str, expected: str) -> Head:
    """Make an ancestor of HEAD the HEAD again; ConflictError unless HEAD is the `expected` version.

    The caller decides whether that is allowed (`sweeps.rollback`).
    """
    found = read_head(store, line)
    if found is None:
        raise IntegrityError(f"model line {line} has no HEAD", "it was deleted", "restore it from a copy")
    head, etag = found
    if head.version != expected:
        raise ConflictError(
            f"HEAD of {line} is {head.version[:12]}, not {expected[:12]}",
            "another version was published meanwhile",
            "check again what the rollback would undo",
        )
    moved = _next_head(line, version, head.sequence, None)
    store.put_if(head_key(line), moved.model_dump_json().encode(), etag)
    return moved


def fetch_version(
    store: FileStore, line: str, digest: str, folder: Path, without: Collection[str] = ()
) -> VersionManifest:
    """Download the files of a version into a folder, which appears complete and verified or not at all.

    UsageError if the version was purged, or if the folder holds other files; one that already holds this version is
    kept.
    """
    manifest = read_version(store, line, digest)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if _holds(folder, {name: entry.sha256 for name, entry in manifest.files.items() if name not in without}):
            return manifest
        raise UsageError(f"{folder} is not empty", "it holds other files", "choose another folder, or empty it")
    check_not_purged(store, line, digest)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            for name, entry in manifest.files.items():
                if name in without:
                    continue
                path = part / check_relative_name(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                fetch_blob(store, entry.sha256, path, entry.size)
            part.chmod(0o755)  # mkdtemp makes it private
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise disk_error(f"cannot fetch {line}@{digest[:12]}", folder, error) from error
    return manifest


def check_not_purged(store: ObjectStore, line: str, digest: str) -> None:
    """Refuse a version whose weights a purge deleted (UsageError)."""
    disposed = read_disposal(store, line, digest)
    if disposed is not None:
        raise UsageError(
            f"{line}@{digest[:12]} has no weights any more",
            f"they were deleted at {disposed.at}: {disposed.reason}",
            f"choose a version with weights: `salun model history {line}`",
        )


def _holds(folder: Path, digests: Mapping[str, str]) -> bool:
    """Return whether a folder holds exactly these files: name -> SHA-256."""
    if not folder.is_dir():
        return False
    found = list_tree(folder)
    return (
        not found.strange
        and found.files == digests.keys()
        and all(sha256_file(folder / name) == digest for name, digest in digests.items())
    )
