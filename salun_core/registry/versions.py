"""Model versions and their lineage: blobs first, then the manifest, then HEAD by compare-and-swap.

What is not reachable from HEAD is invisible, so that a kill between two steps leaves the line as it was.
HEAD moves only from the very parent that a version was made from: a version made from a superseded parent
would bring back what was forgotten since.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salun_core.config import parse
from salun_core.digest import sha256_file
from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.registry.holds import read_disposal
from salun_core.registry.lookup import ancestry, read_head, read_version
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.storage.blobs import FULL_COPY_EVERY, fetch_blob, put_blob, put_sparse, stored_size
from salun_core.storage.keys import check_relative_name, head_key, version_key
from salun_core.storage.local_files import disk_error, list_tree
from salun_core.storage.objects import FileStore, ObjectStore
from salun_core.times import utc_now


def stage_version(
    store: FileStore,
    fields: Mapping[str, Any],
    files: Mapping[str, Path],
    base: Mapping[str, Path] | None = None,
    full_every: int = FULL_COPY_EVERY,
) -> tuple[str, VersionManifest]:
    """Upload the files of a version, then its manifest; it stays invisible until it is published.

    Args:
        store: where to.
        fields: the fields of `VersionManifest` but `files`; `created_at` is now unless it is given.
        files: name, with `/` between folders -> file.
        base: local copies of the parent's files, by name: what has one is stored as its difference to it.
        full_every: so many versions share one full copy; 1 stores each whole.

    Returns:
        The digest of the version, and its manifest.

    Raises:
        UsageError: a field or a file name is wrong; nothing was uploaded.
        IntegrityError: a file in `base` is not the parent's.
        StoreError: a file cannot be read, or the store cannot be reached or refuses us.
    """
    fields = {"created_at": utc_now(), **fields}
    for name in files:
        check_relative_name(name)
    blank = {name: {"sha256": "0" * 64, "size": 0} for name in files}
    planned = parse(VersionManifest, {**fields, "files": blank}, "version manifest")
    parent = read_version(store, planned.line, planned.parent) if base and planned.parent else None
    blobs = {}
    for name, path in files.items():
        if base and parent and name in base and name in parent.files:
            blobs[name] = put_sparse(store, path, base[name], parent.files[name].sha256, full_every)
        else:
            blobs[name] = put_blob(store, path)
    entries = {name: {"sha256": blob.sha256, "size": blob.size} for name, blob in blobs.items()}
    manifest = parse(VersionManifest, {**fields, "files": entries}, "version manifest")
    store.put_new(version_key(manifest.line, manifest.digest), manifest.canonical())
    return manifest.digest, manifest


def publish_head(store: FileStore, line: str, version: str, parent: str | None, run: str | None) -> Head:
    """Make a staged version the HEAD of its line, if HEAD is still its parent.

    Publishing what is HEAD already returns that HEAD: the call may be repeated.

    Args:
        store: where.
        line: the model line.
        version: digest of the staged version.
        parent: digest of the version it was made from; None for the first of a line.
        run: the unlearning run that publishes, if there is one.

    Raises:
        ConflictError: HEAD is not the parent (any more).
        UsageError: there is no such version, or it was made from another parent.
        IntegrityError: a file of the version, or one that it is stored as its difference to, is missing or has
            another size.
    """
    _check_staged(store, line, version, parent)
    found = read_head(store, line)
    if found and found[0].version == version:
        return found[0]
    _check_parent(line, found[0].version if found else None, parent)
    sequence = found[0].sequence + 1 if found else 1
    head = parse(
        Head,
        {"line": line, "version": version, "sequence": sequence, "published_at": utc_now(), "run": run},
        "HEAD",
    )
    return _swap(store, head, parent, found[1] if found else None)


def _check_staged(store: FileStore, line: str, version: str, parent: str | None) -> None:
    manifest = read_version(store, line, version)
    if manifest.parent != parent:
        raise UsageError(
            f"{line}@{version[:12]} was not made from {_short(parent)}",
            f"its parent is {_short(manifest.parent)}",
            "publish it with its own parent",
        )
    for name, entry in manifest.files.items():
        if stored_size(store, entry.sha256) != entry.size:
            raise IntegrityError(
                f"{name} of {line}@{version[:12]} is missing from the store or has another size",
                "it was removed or damaged after it was staged",
                "stage the version again",
            )


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
        if moved and actual == head.version:  # the same version, published by a twin of this run
            return moved[0]
        if moved and any(past.digest == head.version for past in ancestry(store, head.line)):
            return head  # ours was published (its reply was lost), and has a child by now
        _check_parent(head.line, actual, parent)
        raise
    return head


def publish(store: FileStore, fields: Mapping[str, Any], files: Mapping[str, Path]) -> tuple[Head, VersionManifest]:
    """Stage a version and make it HEAD; see `stage_version` and `publish_head`.

    Raises:
        ConflictError: HEAD is not the parent that `fields` names.
    """
    digest, manifest = stage_version(store, fields, files)
    return publish_head(store, manifest.line, digest, manifest.parent, manifest.run), manifest


def fetch_version(store: FileStore, line: str, digest: str, folder: Path) -> VersionManifest:
    """Download all files of a version into a folder, which appears whole and verified or not at all.

    Args:
        store: where from.
        line: the model line.
        digest: the version.
        folder: a folder that does not exist or is empty, or holds this very version already.

    Raises:
        UsageError: the line has no such version, its files were purged, or the folder holds something else.
        IntegrityError: a file does not match its digest, or what it was stored as a difference to is gone.
        StoreError: a file is missing, or the disk is full.
    """
    manifest = read_version(store, line, digest)
    if folder.exists() and not _is_empty(folder):
        if _holds(folder, manifest):
            return manifest
        raise UsageError(f"{folder} is not empty", "it holds other files", "choose another folder, or empty it")
    _check_not_purged(store, line, digest)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            for name, entry in manifest.files.items():
                path = part / check_relative_name(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                fetch_blob(store, entry.sha256, path, entry.size)
            part.chmod(0o755)
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise disk_error(f"cannot fetch {line}@{digest[:12]}", folder, error) from error
    return manifest


def _check_not_purged(store: FileStore, line: str, digest: str) -> None:
    disposed = read_disposal(store, line, digest)
    if disposed is not None:
        raise UsageError(
            f"{line}@{digest[:12]} has no weights any more",
            f"they were disposed of at {disposed.at}: {disposed.reason}",
            f"choose a version that is whole: `salun model history {line}`",
        )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _holds(folder: Path, manifest: VersionManifest) -> bool:
    if not folder.is_dir():
        return False
    found = list_tree(folder)
    return (
        not found.strange
        and found.files == manifest.files.keys()
        and all(sha256_file(folder / name) == entry.sha256 for name, entry in manifest.files.items())
    )
