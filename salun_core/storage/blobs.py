"""Content-addressed blobs: the key is the SHA-256, so that a second upload is harmless."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError
from salun_core.storage.local import disk_error
from salun_core.storage.names import blob_key
from salun_core.storage.objects import FileStore, ObjectStore


@dataclass(frozen=True)
class Blob:
    """A stored file: SHA-256 (64 hex digits) and size in bytes."""

    sha256: str
    size: int


def blob_size(store: ObjectStore, digest: str) -> int | None:
    """Return the size in bytes of a stored blob, or None where there is none."""
    key = blob_key(digest)
    return next((entry.size for entry in store.list(key) if entry.key == key), None)


def put_blob(store: FileStore, path: Path) -> Blob:
    """Upload a file under its digest, unless it is there with the same size.

    Raises:
        StoreError: the file cannot be read, or the store cannot be reached or refuses us.
    """
    blob = _describe(path)
    if blob_size(store, blob.sha256) != blob.size:
        store.upload(path, blob_key(blob.sha256))
    return blob


def _describe(path: Path) -> Blob:
    try:
        return Blob(sha256_file(path), path.stat().st_size)
    except OSError as error:
        raise disk_error(f"cannot read {path.name}", path, error) from error


def fetch_blob(store: FileStore, digest: str, path: Path, size: int | None = None) -> None:
    """Download a blob; the file appears only after its bytes were found to match.

    Args:
        store: where it lies.
        digest: its SHA-256.
        path: the file to write; its folder exists.
        size: its size in bytes where that is known: another size is refused before the download.

    Raises:
        IntegrityError: the bytes do not match.
        StoreError: it is not there, the disk is full, or the store cannot be reached.
    """
    found = blob_size(store, digest) if size is not None else None
    if found is not None and found != size:
        raise IntegrityError(
            f"blob {digest[:12]}… has another size",
            f"expected {size} bytes, found {found}",
            "the copy in the store is damaged: restore it, or upload the version again",
        )
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.unverified")
    try:
        store.download(blob_key(digest), part)
        check_digest(f"blob {digest[:12]}…", digest, sha256_file(part))
        os.replace(part, path)
    except OSError as error:
        raise disk_error(f"cannot write {path.name}", path, error) from error
    finally:
        part.unlink(missing_ok=True)
