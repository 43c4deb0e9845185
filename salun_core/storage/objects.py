"""The interface of an object store: five methods for small documents, four for large files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        served: the server's time of this answer (UTC); None if it sends none.
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

    Keys are relative to the store's prefix. Every method raises `StoreError` if the store is unreachable or refuses
    the credentials.
    """

    def get(self, key: str) -> StoredObject | None:
        """Return an object, or None if it does not exist."""
        ...

    def put_new(self, key: str, data: bytes) -> str:
        """Create an object and return its etag.

        Raises:
            ConflictError: the object exists with other bytes.
        """
        ...

    def put_if(self, key: str, data: bytes, etag: str) -> str:
        """Replace an object if its etag is still the given one, and return the new etag.

        Raises:
            ConflictError: the object changed or was deleted.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose key starts with a prefix, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; deleting one that does not exist succeeds."""
        ...


class FileStore(ObjectStore, Protocol):
    """An object store that also moves large files, without a condition (their keys carry a digest)."""

    @property
    def uri(self) -> str:
        """The address of the store, such as `s3://bucket/prefix`."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Upload a file, in parts if it is large."""
        ...

    def download(self, key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        """Download to a file, which appears complete or not at all.

        Args:
            key: the key.
            path: the file.
            on_bytes: called with the number of bytes that arrived since the last call, from several threads.

        Raises:
            StoreError: the object does not exist.
        """
        ...

    def read_start(self, key: str, size: int) -> bytes | None:
        """Return the first `size` bytes of an object (all, if it has fewer), or None if it does not exist."""
        ...

    def read_range(self, key: str, start: int, size: int, etag: str) -> bytes | None:
        """Return `size` bytes of an object from `start` on; fewer at its end.

        Returns:
            The bytes; None if the object does not exist or has another etag, so that what is read in pieces is of one
            state.
        """
        ...
