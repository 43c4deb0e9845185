"""What the harness writes down beside the store: every conditional write that succeeded, as its writer saw it.

The store shows only what stands now. The journal tells of a HEAD that was overwritten, an event that was written twice,
a lease that was taken too early. A line is appended by one write, so that a SIGKILL leaves it whole or out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun_core.digest import sha256_bytes
from salun_core.storage.s3 import S3Store, make_client

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_SLOW = 0.5
Hook = Callable[[str, str], None]


def write(path: Path, **entry: object) -> None:
    """Append an entry."""
    line = json.dumps({"at": time.time(), **entry}).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield all entries in the order in which they were appended."""
    if path.exists():
        yield from (json.loads(line) for line in path.read_text().splitlines())


def note(path: Path, key: str, data: bytes) -> None:
    """Append what a conditional write stored, if it is of a kind that the auditor looks at."""
    kind, *rest = key.split("/")
    if kind == "lines" and rest[1] == "HEAD.json":
        write(path, kind="head", line=rest[0], body=json.loads(data))
    elif kind == "leases":
        write(path, kind="lease", body=json.loads(data))
    elif "/events/" in key:
        write(path, kind="event", key=key, sha256=sha256_bytes(data))
    elif kind == "certificates":
        write(path, kind="certificate", key=key, sha256=sha256_bytes(data))
    elif kind == "runs" and rest[1] == "outcome.json":
        write(path, kind="outcome", run=rest[0], state=json.loads(data)["state"])


@lru_cache(4)
def _client(endpoint: str, process: int) -> S3Client:
    """Return a client, one for all stores of a process: to build one takes longer than all that a small test sends."""
    return make_client(endpoint)


def forget_clients() -> None:
    """Let the next store of this process have a client of its own, as that of a new process would be."""
    _client.cache_clear()


class JournalStore(S3Store):
    """A store that notes what it wrote, and calls a hook before and after each of its calls.

    Args:
        uri: `s3://bucket/prefix`.
        journal: the file; none where nothing is noted.
        hook: called with "before put" or "after put" (get, list, delete, upload) and the key.
        endpoint: URL of the store, where it is not the environment's.
    """

    def __init__(
        self, uri: str, journal: Path | None = None, hook: Hook | None = None, endpoint: str | None = None
    ) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        super().__init__(bucket, prefix, client=_client(endpoint or os.environ["AWS_ENDPOINT_URL"], os.getpid()))
        self.journal, self.hook = journal, hook or (lambda step, key: None)

    def _write(self, key, data, etag):
        self.hook("before put", key)
        with self._timed():
            written = super()._write(key, data, etag)
        if self.journal:
            note(self.journal, key, data)
        self.hook("after put", key)
        return written

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            if self.journal and (seconds := time.monotonic() - begin) > _SLOW:
                write(self.journal, kind="call", seconds=seconds)

    def get(self, key):
        self.hook("before get", key)
        with self._timed():
            return super().get(key)

    def list(self, prefix):
        self.hook("before list", prefix)
        yield from super().list(prefix)

    def delete(self, key):
        self.hook("before delete", key)
        super().delete(key)
        self.hook("after delete", key)

    def upload(self, path, key):
        self.hook("before upload", key)
        super().upload(path, key)
        self.hook("after upload", key)
