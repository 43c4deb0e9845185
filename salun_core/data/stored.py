"""Files of the data in S3: read by ranges, and optionally kept as blocks in a folder that pods share.

What the readers of Parquet, tar and images use of a file is what `Path` has: `name`, `stat().st_size` and `open`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from salun_core.errors import DataError
from salun_core.storage import FileStore, open_store

_REMEDY = "do not change the data during a run, and run it again"


class _Size(NamedTuple):
    st_size: int


@dataclass(frozen=True)
class StoredFile:
    """An object that is read by ranges, all of them of one state of it.

    Args:
        store: where it is.
        key: its key.
        size: in bytes, as listed.
        etag: as listed; an object that was replaced since is an error.
        cache: keeps blocks; None reads from the store only.
    """

    store: FileStore
    key: str
    size: int
    etag: str

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def stat(self) -> _Size:
        """Return its size, as `Path.stat` does."""
        return _Size(self.size)

    def open(self, mode: str = "rb") -> io.RawIOBase:
        """Open it for reading bytes; no request is sent."""
        assert mode == "rb"
        return _Ranges(self)

    def read(self, start: int, length: int) -> bytes:
        """Return some bytes; fewer at its end.

        Raises:
            DataError: it was replaced or deleted since it was listed.
            StoreError: the store is unreachable.
        """
        length = min(length, self.size - start)
        if length <= 0:
            return b""
        data = self.store.read_range(self.key, start, length, self.etag)
        if data is None or len(data) != length:
            raise DataError(f"{self.name} changed", "it was replaced or deleted in the store", _REMEDY)
        return data


@dataclass(frozen=True)
class StoredFolder:
    """Objects that are read whole, by their names.

    Args:
        store: where they are.
        prefix: what their keys begin with, without the `/`.
    """

    store: FileStore
    prefix: str

    @classmethod
    def of(cls, uri: str, name: str) -> StoredFolder:
        """Return a folder of a source, or the source itself if the name is empty."""
        store, prefix = _opened(uri)
        return cls(store, "/".join(filter(None, (prefix, name))))

    @property
    def name(self) -> str:
        """The last part of the prefix."""
        return self.prefix.rpartition("/")[2]

    def read(self, name: str, limit: int) -> bytes:
        """Return an object.

        Raises:
            DataError: it does not exist, or is larger than the limit in bytes.
        """
        data = self.store.read_start("/".join(filter(None, (self.prefix, name))), limit + 1)
        remedy, public = "replace it, or take it out of the data", "an image of the data cannot be read"
        if data is None:
            raise DataError(f"cannot read image {name}", "the store does not have it", remedy, public=public)
        if len(data) > limit:
            raise DataError(f"image {name} is too large", f"over {limit} bytes", remedy, public=public)
        return data


def _opened(uri: str) -> tuple[FileStore, str]:
    """Return the store of a source, and the source's prefix in it; empty for a whole bucket."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return (open_store(uri), "") if parent in ("s3:/", "s3:") else (open_store(parent), name)


def stored_files(uri: str) -> dict[str, StoredFile]:
    """List the objects of a source by their names relative to it; that of a single object is empty.

    Raises:
        DataError: a key may lead out of a folder.
        StoreError: the store is unreachable.
    """
    store, prefix = _opened(uri)
    found = {}
    for entry in store.list(prefix):
        if prefix and entry.key != prefix and not entry.key.startswith(f"{prefix}/"):
            continue
        if entry.key.startswith("/") or ".." in PurePosixPath(entry.key).parts:
            raise DataError("a data object has an unsafe key", repr(entry.key), "rename it")
        name = entry.key[len(prefix) :].removeprefix("/") if prefix else entry.key
        found[name] = StoredFile(store, entry.key, entry.size, entry.etag)
    return found


def for_arrow(file: Path | StoredFile) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Open a file for pyarrow."""
    import pyarrow

    return pyarrow.OSFile(str(file)) if isinstance(file, Path) else pyarrow.PythonFile(file.open(), mode="r")


class _Ranges(io.RawIOBase):
    """A stored file as a file object: each read is one request."""

    def __init__(self, file: StoredFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._place, self._file.size if size is None or size < 0 else size)
        self._place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a buffer
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
