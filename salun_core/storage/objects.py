"""The interface of an object store: five methods for small documents, three for large files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class StoredObject:
    """One object as it was read.

    Args:
        data: its bytes.
        etag: an opaque token for `put_if`; never a checksum.
        modified: the server's time of its last change (UTC).
        served: the server's time of this answer (UTC); None where it tells none.
    """

    data: bytes
    etag: str
    modified: datetime
    served: datetime | None = None


@dataclass(frozen=True)
class Entry:
    """One row of a listing: key (relative to the store's prefix), size in bytes, server's time, etag."""

    key: str
    size: int
    modified: datetime
    etag: str


class ObjectStore(Protocol):
    """Small documents, each written with a condition.

    Keys are relative to the store's prefix. Every method raises `StoreError` when the store cannot be
    reached or refuses the credentials.
    """

    def get(self, key: str) -> StoredObject | None:
        """Return an object, or None where there is none of that key."""
        ...

    def put_new(self, key: str, data: bytes) -> str:
        """Create an object and return its etag.

        Raises:
            ConflictError: an object of that key exists and holds other bytes.
        """
        ...

    def put_if(self, key: str, data: bytes, etag: str) -> str:
        """Replace an object if its etag is still the given one, and return the new etag.

        Raises:
            ConflictError: the object changed, or is gone.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose key starts with a prefix, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; deleting one that does not exist is no error."""
        ...


class FileStore(ObjectStore, Protocol):
    """An object store that moves large files too, without a condition (their keys carry a digest)."""

    @property
    def uri(self) -> str:
        """The address of the store, such as `s3://bucket/prefix`."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Upload a file, in parts where it is large."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Download to a file, which appears whole or not at all.

        Raises:
            StoreError: there is no object of that key.
        """
        ...

    def read_start(self, key: str, size: int) -> bytes | None:
        """Return the first `size` bytes of an object (all, where it has fewer), or None where there is none."""
        ...
