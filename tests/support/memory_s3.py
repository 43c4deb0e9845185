"""An S3 server in this process: what `S3Store` and `erase` send, without the network.

A request to the real server takes 4 ms of processor time, one to this takes a hundredth of that. It is for tests of
what is built on the store, such as the ledger, sweeps and purges. `S3Store` itself is real, so are its conditions and
errors. `test_memory_s3.py` compares the answers with those of the real server. Other processes do not see it.
"""
# ruff: noqa: N803 - the names of arguments are boto3's

from __future__ import annotations

import hashlib
import io
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.hooks import HierarchicalEmitter

_UNVERSIONED = "null"


@dataclass(frozen=True)
class _Version:
    data: bytes | None  # None: a delete marker
    modified: datetime
    metadata: dict[str, str] = field(default_factory=dict)
    id: str = _UNVERSIONED

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data or b"").hexdigest()}"'


@dataclass
class _Bucket:
    keeps_versions: bool = False
    objects: dict[str, list[_Version]] = field(default_factory=dict)  # of each key the newest first
    uploads: dict[str, tuple[str, datetime, dict[int, bytes]]] = field(default_factory=dict)

    def live(self, key: str) -> _Version | None:
        newest = next(iter(self.objects.get(key, ())), None)
        return newest if newest is not None and newest.data is not None else None

    def add(self, key: str, version: _Version) -> None:
        kept = self.objects.setdefault(key, [])
        if version.id == _UNVERSIONED:
            kept[:] = [item for item in kept if item.id != _UNVERSIONED]
        kept.insert(0, version)

    def remove(self, key: str, version: str) -> None:
        left = [item for item in self.objects.get(key, ()) if item.id != version]
        if left:
            self.objects[key] = left
        else:
            self.objects.pop(key, None)


class MemoryS3:
    """Buckets, and clients of them; `ahead` moves the server's clock."""

    def __init__(self, *buckets: str) -> None:
        self.buckets = {name: _Bucket() for name in buckets}
        self.ahead = timedelta(0)
        self.lock = threading.RLock()
        self._shared = MemoryClient(self)

    def now(self) -> datetime:
        """Return the server's time; S3 counts whole seconds."""
        return (datetime.now(UTC) + self.ahead).replace(microsecond=0)

    def client(self, endpoint: str | None = None, settings: object = None) -> MemoryClient:
        """Return a client with event handlers of its own, as `make_client` does."""
        return MemoryClient(self)

    def shared(self) -> MemoryClient:
        """Return the client that all stores share, as `shared_client` does."""
        return self._shared


def _refusal(operation: str, code: str, status: int) -> ClientError:
    answer: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, operation)


class MemoryClient:
    """The methods of boto3's client that SalUn calls, with boto3's events before each request."""

    def __init__(self, server: MemoryS3) -> None:
        self._server = server
        self.meta = SimpleNamespace(events=HierarchicalEmitter(), endpoint_url="http://memory")

    def _begin(self, operation: str, bucket: str, key: str = "", **query: str) -> _Bucket:
        """Tell the handlers, which may raise or send other requests, and return the bucket."""
        params = {"url_path": f"/{bucket}/{key}", "query_string": query, "headers": {}}
        self.meta.events.emit(f"before-call.s3.{operation}", model=SimpleNamespace(name=operation), params=params)
        if bucket not in self._server.buckets:
            raise _refusal(operation, "NoSuchBucket", 404)
        return self._server.buckets[bucket]

    def create_bucket(self, *, Bucket: str) -> None:
        self._server.buckets[Bucket] = _Bucket()

    def put_bucket_versioning(self, *, Bucket: str, VersioningConfiguration: dict[str, str]) -> None:
        self._begin("PutBucketVersioning", Bucket).keeps_versions = VersioningConfiguration["Status"] == "Enabled"

    def head_bucket(self, *, Bucket: str) -> None:
        self._begin("HeadBucket", Bucket)

    def put_object(
        self,
        *,
        Bucket: str,
        Key: str,
        Body: bytes,
        Metadata: dict[str, str] | None = None,
        IfNoneMatch: str | None = None,
        IfMatch: str | None = None,
        ChecksumAlgorithm: str = "",
    ) -> dict[str, Any]:
        found = self._begin("PutObject", Bucket, Key)
        with self._server.lock:
            before = found.live(Key)
            if IfMatch is not None and before is None:
                raise _refusal("PutObject", "NoSuchKey", 404)
            if (IfNoneMatch and before is not None) or (before is not None and IfMatch not in (None, before.etag)):
                raise _refusal("PutObject", "PreconditionFailed", 412)
            return {"ETag": self._store(found, Key, bytes(Body), Metadata or {}).etag}

    def _store(self, found: _Bucket, key: str, data: bytes | None, metadata: dict[str, str]) -> _Version:
        name = secrets.token_hex(16) if found.keeps_versions else _UNVERSIONED
        version = _Version(data, self._server.now(), metadata, name)
        found.add(key, version)
        return version

    def _find(self, operation: str, found: _Bucket, key: str, version: str | None = None) -> _Version:
        if version is not None:
            item = next((item for item in found.objects.get(key, ()) if item.id == version), None)
            code = "NoSuchVersion"
        else:
            item, code = found.live(key), "404" if operation == "HeadObject" else "NoSuchKey"
        if item is None or item.data is None:
            raise _refusal(operation, code, 404)
        return item

    def get_object(
        self, *, Bucket: str, Key: str, Range: str | None = None, VersionId: str | None = None
    ) -> dict[str, Any]:
        found = self._begin("GetObject", Bucket, Key)
        with self._server.lock:
            item = self._find("GetObject", found, Key, VersionId)
        data = item.data or b""
        if Range is not None:
            first, last = map(int, Range.removeprefix("bytes=").split("-"))
            if first >= len(data):
                raise _refusal("GetObject", "InvalidRange", 416)
            data = data[first : last + 1]
        date = format_datetime(self._server.now(), usegmt=True)
        return {
            "Body": io.BytesIO(data),
            "ContentLength": len(data),
            "ETag": item.etag,
            "LastModified": item.modified,
            "Metadata": item.metadata,
            "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {"date": date}},
        }

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        found = self._begin("HeadObject", Bucket, Key)
        with self._server.lock:
            item = self._find("HeadObject", found, Key)
        return {"ContentLength": len(item.data or b""), "ETag": item.etag, "LastModified": item.modified}

    def delete_object(self, *, Bucket: str, Key: str, VersionId: str | None = None) -> None:
        found = self._begin("DeleteObject", Bucket, Key)
        with self._server.lock:
            if VersionId is not None:
                found.remove(Key, VersionId)
            elif found.keeps_versions:
                self._store(found, Key, None, {})
            else:
                found.remove(Key, _UNVERSIONED)

    def upload_file(self, name: str, bucket: str, key: str, ExtraArgs: object = None, Config: object = None) -> None:
        data = Path(name).read_bytes()
        found = self._begin("PutObject", bucket, key)
        with self._server.lock:
            self._store(found, key, data, {})

    def download_fileobj(self, bucket: str, key: str, file: Any, Callback: Any = None, Config: object = None) -> None:
        self.head_object(Bucket=bucket, Key=key)
        data = self.get_object(Bucket=bucket, Key=key)["Body"].read()
        file.write(data)
        if Callback is not None:
            Callback(len(data))

    def copy(self, origin: dict[str, str], bucket: str, key: str, Config: object = None) -> None:
        self.head_object(Bucket=origin["Bucket"], Key=origin["Key"])
        found = self._begin("CopyObject", bucket, key)
        with self._server.lock:
            source = self._find("CopyObject", self._server.buckets[origin["Bucket"]], origin["Key"])
            self._store(found, key, source.data, source.metadata)

    def create_multipart_upload(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        found, name = self._begin("CreateMultipartUpload", Bucket, Key), secrets.token_hex(16)
        found.uploads[name] = (Key, self._server.now(), {})
        return {"UploadId": name}

    def upload_part(self, *, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes) -> None:
        self._begin("UploadPart", Bucket, Key).uploads[UploadId][2][PartNumber] = Body

    def abort_multipart_upload(self, *, Bucket: str, Key: str, UploadId: str) -> None:
        if self._begin("AbortMultipartUpload", Bucket, Key).uploads.pop(UploadId, None) is None:
            raise _refusal("AbortMultipartUpload", "NoSuchUpload", 404)

    def get_paginator(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(paginate=getattr(self, f"_{name}"))

    def _list_objects_v2(self, *, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        found = self._begin("ListObjectsV2", Bucket, prefix=Prefix)
        with self._server.lock:
            items = [(key, found.live(key)) for key in found.objects if key.startswith(Prefix)]
            rows = [{"Key": key, **_row(item)} for key, item in sorted(items, key=lambda row: row[0]) if item]
        yield {"IsTruncated": False, "Contents": rows}

    def _list_object_versions(self, *, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        found = self._begin("ListObjectVersions", Bucket, prefix=Prefix)
        with self._server.lock:
            rows = [
                (item.data is None, {"Key": key, "VersionId": item.id, "IsLatest": not place, **_row(item)})
                for key in sorted(found.objects)
                if key.startswith(Prefix)
                for place, item in enumerate(found.objects[key])
            ]
        yield {
            "IsTruncated": False,
            "Versions": [row for marker, row in rows if not marker],
            "DeleteMarkers": [row for marker, row in rows if marker],
        }

    def _list_multipart_uploads(self, *, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        found = self._begin("ListMultipartUploads", Bucket, prefix=Prefix)
        rows = [
            {"Key": key, "UploadId": name, "Initiated": initiated}
            for name, (key, initiated, _) in found.uploads.items()
            if key.startswith(Prefix)
        ]
        yield {"IsTruncated": False, "Uploads": rows}

    def _list_parts(self, *, Bucket: str, Key: str, UploadId: str) -> Iterator[dict[str, Any]]:
        found = self._begin("ListParts", Bucket, Key)
        if UploadId not in found.uploads:
            raise _refusal("ListParts", "NoSuchUpload", 404)
        yield {"IsTruncated": False, "Parts": [{"Size": len(part)} for part in found.uploads[UploadId][2].values()]}


def _row(item: _Version) -> dict[str, Any]:
    marker = item.data is None
    return {"LastModified": item.modified, **({} if marker else {"Size": len(item.data or b""), "ETag": item.etag})}


@pytest.fixture
def memory_s3(monkeypatch: pytest.MonkeyPatch) -> MemoryS3:
    """The server that every store of this process is on, until the test ends; it has the bucket `salun`."""
    server = MemoryS3("salun")
    monkeypatch.setattr("salun_core.storage.s3.make_client", server.client)
    monkeypatch.setattr("salun_core.storage.s3.shared_client", server.shared)
    return server


@pytest.fixture
def store(memory_s3: MemoryS3) -> Any:
    """An empty store of the server in memory; it takes the place of the fixture of the same name."""
    from salun_core.storage import open_store

    return open_store(f"s3://salun/{secrets.token_hex(8)}")
