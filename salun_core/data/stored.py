"""Files of the data in S3: read by ranges, and optionally kept as blocks in a folder that pods share.

What the readers of Parquet, tar and images use of a file is what `Path` has: `name`, `stat().st_size` and `open`.

The cache is a folder, such as a volume that the pods of a run mount, with one folder for each four hours. It holds
images of people who are to be forgotten, in clear. Only its user may read it, a block is in it for at most twelve
hours, and a purge empties it. A block is written under a temporary name and renamed. What can happen:

- A process dies while it writes: the temporary file stays until the folder of its four hours is deleted.
- Two processes write the same block: both write a file of their own with the same bytes, and the last rename wins.
- A purge empties the folder while another process writes a block: the block may stay, for at most twelve hours.
- Another user wrote a block: it is read from the store. A purge that may not delete it fails.
- A folder is deleted while a block is read from it or written into it: the open file stays readable, and a write fails,
  which only means that the next reader asks the store again. So does a full disk.
- A block is damaged: it begins with its SHA-256. One that does not match is deleted and read from the store.
- The clocks of two machines differ: a block lives for a longer or a shorter time, by that difference.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from salun_core.digest import sha256_bytes
from salun_core.errors import DataError
from salun_core.storage import FileStore, open_store
from salun_core.storage.local_files import disk_error

CACHE_VARIABLE = "SALUN_DATA_CACHE"
_PERIOD = 4 * 3600  # seconds whose blocks are in one folder
_PERIODS = 3  # that are kept, the current one included
_NEAR, _IN_A_ROW = 64 << 10, 4  # bytes between reads that follow each other; reads before the first one ahead
_MOST_AHEAD = 4 << 20  # bytes of a request beyond those of its read
_REMEDY = "do not change the data during a run, and run it again"


class BlockCache:
    """Bytes that were read from a store, in an existing folder; `clock` returns seconds since 1970."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock

    @classmethod
    def from_environment(cls) -> BlockCache | None:
        """Return the cache in the folder that `SALUN_DATA_CACHE` names, without expired blocks; None if not set."""
        name = os.environ.get(CACHE_VARIABLE, "").strip()
        if not name:
            return None
        cache = cls(Path(name))
        try:
            Path(name).mkdir(mode=0o700, parents=True, exist_ok=True)
            cache.expire()
        except OSError as error:
            raise disk_error(f"cannot use the folder of {CACHE_VARIABLE}", Path(name), error) from error
        return cache

    def read(self, identity: str, fetch: Callable[[], bytes]) -> bytes:
        """Return a block from the folder, or else from `fetch`; the same identity always means the same bytes."""
        name, now = f"{sha256_bytes(identity.encode())}.block", self._now
        for period in range(now, now - _PERIODS, -1):
            path = self._folder / str(period) / name
            with suppress(OSError):
                stored = path.read_bytes()
                if hashlib.sha256(stored[32:]).digest() == stored[:32]:
                    return stored[32:]
                path.unlink()
        data = fetch()
        with suppress(OSError):
            self._write(self._folder / str(now), name, data)
        return data

    def _write(self, folder: Path, name: str, data: bytes) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(part).replace(folder / name)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise

    @property
    def _now(self) -> int:
        return int(self._clock() // _PERIOD)

    def expire(self, keep: int = _PERIODS) -> int:
        """Delete expired blocks and return how many.

        `keep` is the number of four-hour periods that stay, the current one included. 0 empties the cache, and raises
        StoreError if that fails. Blocks that are merely too old are left if they cannot be deleted.
        """
        oldest, count = self._now - keep, 0
        faults: list[BaseException] = []
        for folder in self._folder.iterdir():
            if folder.name.isdecimal() and folder.is_dir() and (not keep or int(folder.name) <= oldest):
                count += sum(1 for _ in folder.glob("*.block"))
                shutil.rmtree(folder, onerror=lambda _function, _path, found: faults.append(found[1]))
        # A file that is missing was deleted by another process, and a folder that is not empty has a new block.
        usual = (errno.ENOENT, errno.ENOTEMPTY)
        denied = [fault for fault in faults if isinstance(fault, OSError) and fault.errno not in usual]
        if denied and not keep:
            raise disk_error("the cache of the data cannot be emptied", self._folder, denied[0])
        return count


class _Size(NamedTuple):
    st_size: int


@dataclass(frozen=True)
class StoredFile:
    """An object that is read by ranges. One that was replaced since it was listed (by its `etag`) is an error.

    A `cache` of None reads from the store only.
    """

    store: FileStore
    key: str
    size: int
    etag: str
    cache: BlockCache | None = None

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
        """Return some bytes, fewer at the end; raises DataError if the object was replaced or deleted."""
        length = min(length, self.size - start)
        if length <= 0:
            return b""
        if self.cache is None:
            return self._fetch(start, length)
        identity = f"{self.store.uri}/{self.key}\n{self.etag}\n{self.size}\n{start}\n{length}"
        return self.cache.read(identity, lambda: self._fetch(start, length))

    def _fetch(self, start: int, length: int) -> bytes:
        data = self.store.read_range(self.key, start, length, self.etag)
        if data is None or len(data) != length:
            raise DataError(f"{self.name} changed", "it was replaced or deleted in the store", _REMEDY)
        return data


@dataclass(frozen=True)
class StoredFolder:
    """Objects that are read whole, by their names below a prefix that has no final `/`.

    A `cache` of None reads from the store only.
    """

    store: FileStore
    prefix: str
    cache: BlockCache | None = None

    @classmethod
    def of(cls, uri: str, name: str) -> StoredFolder:
        """Return a folder of a source, or the source itself if the name is empty."""
        store, prefix = _opened(uri)
        return cls(store, "/".join(filter(None, (prefix, name))), BlockCache.from_environment())

    @property
    def name(self) -> str:
        """The last part of the prefix."""
        return self.prefix.rpartition("/")[2]

    def read(self, name: str, limit: int, identity: str) -> bytes:
        """Return an object of at most `limit` bytes; `identity` is the digest of its content, by which it is cached."""
        return self.cache.read(identity, lambda: self._fetch(name, limit)) if self.cache else self._fetch(name, limit)

    def _fetch(self, name: str, limit: int) -> bytes:
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
    """List the objects of a source by their names relative to it; the name of a single object is empty.

    Raises DataError if a key may lead out of a folder.
    """
    store, prefix = _opened(uri)
    found, cache = {}, BlockCache.from_environment()
    for entry in store.list(prefix):
        if prefix and entry.key != prefix and not entry.key.startswith(f"{prefix}/"):
            continue
        if entry.key.startswith("/") or ".." in PurePosixPath(entry.key).parts:
            raise DataError("a data object has an unsafe key", repr(entry.key), "rename it")
        name = entry.key[len(prefix) :].removeprefix("/") if prefix else entry.key
        found[name] = StoredFile(store, entry.key, entry.size, entry.etag, cache)
    return found


def for_arrow(file: Path | StoredFile) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Open a file for pyarrow."""
    import pyarrow

    return pyarrow.OSFile(str(file)) if isinstance(file, Path) else pyarrow.PythonFile(file.open(), mode="r")


class _Ranges(io.RawIOBase):
    """A stored file as a file object.

    Each read is one request, of exactly its bytes, as long as reads are far apart. After four reads that follow each
    other, such as those of many groups of a Parquet file, a request fetches more at once, and the next one twice as
    much: a request costs milliseconds of processor time. The unused bytes are at most about as many as the used ones.
    With a cache nothing is read ahead, because another reader would request other ranges.
    """

    def __init__(self, file: StoredFile) -> None:
        self._file, self._place = file, 0
        self._held, self._from = b"", 0  # the bytes of the last request, and where they begin
        self._end, self._row = 0, 0  # where the last read ended, and how many reads followed each other until then
        self._ahead = 0  # how much the last request read ahead

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
        start = self._place
        left = max(0, self._file.size - start)
        size = left if size is None or size < 0 else min(size, left)
        self._row = self._row + 1 if 0 < self._end <= start <= self._end + _NEAR else 0
        if not self._from <= start <= start + size <= self._from + len(self._held):
            follows = self._row >= _IN_A_ROW and self._file.cache is None
            self._ahead = min(_MOST_AHEAD, max(size, 2 * self._ahead)) if follows else 0
            self._held, self._from = self._file.read(start, size + self._ahead), start
        data = self._held[start - self._from :][:size]
        self._place = self._end = start + size
        return data

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a buffer
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
