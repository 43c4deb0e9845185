"""Content-addressed files: the key is the SHA-256, so that a second upload is harmless."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError
from salun_core.storage.keys import blob_key
from salun_core.storage.local_files import disk_error
from salun_core.storage.objects import FileStore, ObjectStore


@dataclass(frozen=True)
class Blob:
    """A stored file: SHA-256 (64 hex digits) and size in bytes."""

    sha256: str
    size: int


def blob_size(store: ObjectStore, digest: str) -> int | None:
    """Return the size in bytes of a stored file, or None if it is not stored."""
    key = blob_key(digest)
    return next((entry.size for entry in store.list(key) if entry.key == key), None)


def put_blob(store: FileStore, path: Path) -> Blob:
    """Upload a file under its digest, unless it is stored with the same size."""
    try:
        blob = Blob(sha256_file(path), path.stat().st_size)
    except OSError as error:
        raise disk_error(f"cannot read {path.name}", path, error) from error
    if blob_size(store, blob.sha256) != blob.size:
        store.upload(path, blob_key(blob.sha256))
    return blob


def fetch_blob(
    store: FileStore,
    digest: str,
    path: Path,
    size: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Download a file, which appears only after its bytes were found to match.

    Another `size` than the given one is refused before the download. `on_bytes` gets the number of bytes that arrived
    since its last call, from several threads.
    """
    found = blob_size(store, digest) if size is not None else None
    if found not in {None, size}:
        raise IntegrityError(
            f"blob {digest[:12]}… has another size",
            f"expected {size} bytes, found {found}",
            "restore it from a copy, or upload the version again",
        )
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.unverified")
    try:
        store.download(blob_key(digest), part, on_bytes)
        check_digest(f"blob {digest[:12]}…", digest, sha256_file(part))
        os.replace(part, path)
    except OSError as error:
        raise disk_error(f"cannot write {path.name}", path, error) from error
    finally:
        part.unlink(missing_ok=True)
