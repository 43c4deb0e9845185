"""The documents of a store in a dict: what `ObjectStore` promises, without the network."""

import hashlib
import threading
from datetime import UTC, datetime

from salun_core.errors import ConflictError
from salun_core.storage.objects import Entry, StoredObject

START = datetime(2026, 1, 31, 9, tzinfo=UTC)


class Killed(BaseException):
    """Ends a call in its midst; nothing may catch it."""


class MemoryStore:
    """Keeps documents; `now` is the server's time, and the writer is killed when `writes_left` are used up."""

    def __init__(self):
        self.objects, self.now, self.writes_left, self.calls = {}, START, None, 0

    def _write(self):
        self.calls += 1
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise Killed

    def get(self, key):
        self.calls += 1
        return StoredObject(*self.objects[key], served=self.now) if key in self.objects else None

    def put_new(self, key, data):
        self._write()
        if key not in self.objects:
            self.objects[key] = (data, hashlib.md5(data).hexdigest(), self.now)
        elif self.objects[key][0] != data:
            raise ConflictError(f"{key} exists already")
        return self.objects[key][1]

    def put_if(self, key, data, etag):
        self._write()
        if key not in self.objects or self.objects[key][1] != etag:
            raise ConflictError(f"{key} changed")
        self.objects[key] = (data, hashlib.md5(data).hexdigest(), self.now)
        return self.objects[key][1]

    def list(self, prefix):
        self.calls += 1
        yield from (
            Entry(key, len(data), modified, etag)
            for key, (data, etag, modified) in sorted(self.objects.items())
            if key.startswith(prefix)
        )

    def delete(self, key):
        self._write()
        self.objects.pop(key, None)


class MemoryFiles(MemoryStore):
    """Keeps files too, for threads of one process; `hook` is called with the number of each write, before it."""

    uri = "s3://memory/store"

    def __init__(self):
        super().__init__()
        self.hook, self.written, self._lock = (lambda number: None), 0, threading.RLock()

    def _write(self):
        with self._lock:
            super()._write()
            number = self.written
            self.written += 1
        self.hook(number)  # outside of the lock: others may write meanwhile

    def put_new(self, key, data):
        self._write()
        with self._lock:
            if key in self.objects and self.objects[key][0] != data:
                raise ConflictError(f"{key} exists already")
            self.objects.setdefault(key, (data, hashlib.md5(data).hexdigest(), self.now))
            return self.objects[key][1]

    def put_if(self, key, data, etag):
        self._write()
        with self._lock:
            if key not in self.objects or self.objects[key][1] != etag:
                raise ConflictError(f"{key} changed")
            self.objects[key] = (data, hashlib.md5(data).hexdigest(), self.now)
            return self.objects[key][1]

    def list(self, prefix):
        with self._lock:
            found = list(super().list(prefix))
        yield from found

    def upload(self, path, key):
        self._write()
        data = path.read_bytes()
        with self._lock:
            self.objects[key] = (data, hashlib.md5(data).hexdigest(), self.now)

    def download(self, key, path, on_bytes=None):
        path.write_bytes(self.objects[key][0])

    def read_start(self, key, size):
        return self.objects[key][0][:size] if key in self.objects else None

    def read_range(self, key, start, size, etag):
        data, current, _ = self.objects.get(key, (b"", None, None))
        return data[start : start + size] if current == etag else None
