"""The object store on S3: conditional writes for documents, managed transfers for files.

What can happen to a conditional write (`put_new`, `put_if`), and what the caller sees:

- The request is lost before the store commits it: botocore sends it again.
- The store commits it and the reply is lost: botocore sends it again, and the store answers 412 because of our own
  first write. So every write carries a random token in the object's metadata. After a 412, or when no answer came at
  all, the object is read back: with our token in it (or, for a create, with the same bytes) the write succeeded.
- Two writers race: the loser gets 412 and a ConflictError, or 409 and another try.
- The write succeeds, and another writer replaces it before it is read back: the caller sees a ConflictError although
  its bytes were in the store for a moment. `registry.versions` therefore also looks through the ancestors of HEAD.
- The process is killed after the commit: the caller repeats the call. A create of the same bytes succeeds again; a
  swap ends in a ConflictError, and the caller decides from what it reads.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from salun_core.config import MAX_DOCUMENT_BYTES
from salun_core.digest import sha256_bytes
from salun_core.errors import IntegrityError, StoreError
from salun_core.storage.keys import check_key
from salun_core.storage.local_files import disk_error
from salun_core.storage.objects import Entry, StoredObject
from salun_core.storage.s3_errors import code_of, conflict, is_missing, is_unclear, rows_of, status_of, translated
from salun_core.storage.s3_settings import PREFIX, own_settings, session_arguments, variable

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import CopySourceTypeDef

_PART = 16 * 1024 * 1024  # few enough parts for 160 GB (S3 allows 10,000), small enough to send again
_TRANSFER = TransferConfig(multipart_threshold=2 * _PART, multipart_chunksize=_PART, max_concurrency=4)
_COPY = TransferConfig(  # the server copies; a part of this size takes far less than the read timeout
    multipart_threshold=16 * _PART, multipart_chunksize=16 * _PART, use_threads=False
)
_WRITER = "salun-writer"  # metadata that holds the token of the writing call
_READ_ATTEMPTS = 4
_RACE_ATTEMPTS = 8
_CUT_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_CREDENTIAL_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
T = TypeVar("T")


def make_client(endpoint: str | None = None) -> S3Client:
    """Build a client with bounded retries and timeouts, by default for the endpoint that the environment names.

    The endpoint comes from SALUN_S3_ENDPOINT_URL, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or AWS itself. Region and keys
    come from SALUN_S3_REGION, SALUN_S3_ACCESS_KEY_ID, SALUN_S3_SECRET_ACCESS_KEY and SALUN_S3_SESSION_TOKEN; what is
    not set there comes from boto3's chain (AWS_*, roles, files).
    """
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 5},
        max_pool_connections=64,
        response_checksum_validation="when_supported",  # overrides the environment: it catches flipped bits
    )
    settings = own_settings()
    endpoint = endpoint or settings.get("ENDPOINT_URL")
    try:
        with translated("cannot set up the S3 client", endpoint or "the store"):
            # A session of its own: boto3's default session never reads changed credentials.
            session = boto3.session.Session(**session_arguments(settings))
            client = session.client("s3", endpoint_url=endpoint, config=config)
            _notice_cut_answers(client)
            return client
    except ValueError as error:  # botocore raises it for an endpoint that is not a URL
        raise StoreError(
            "cannot set up the S3 client",
            str(error),
            f"set {variable('ENDPOINT_URL')} to http://host:port or https://host",
        ) from error


def _notice_cut_answers(client: S3Client) -> None:
    """Let a client treat an answer that broke off like a connection that broke off: it sends the request again.

    botocore does so for a body that it streams. It takes cut headers for whole ones, and an empty body for an empty
    result: a listing would have no keys, and a purge would delete all that no listed version needs. There is no public
    hook between the answer and botocore's retries.
    """
    session = client._endpoint.http_session  # type: ignore[attr-defined]  # noqa: SLF001
    send = session.send

    def send_whole(request: Any) -> Any:  # noqa: ANN401 - botocore's AWSPreparedRequest and AWSResponse
        answer = send(request)
        if _is_cut(request, answer):
            raise ConnectionClosedError(endpoint_url=request.url, error="the answer broke off", request=request)
        return answer

    session.send = send_whole


def _is_cut(request: Any, answer: Any) -> bool:  # noqa: ANN401 - as above
    """Return whether an answer has half a header, no length, or another length; a streamed body is checked later."""
    length = answer.headers.get("Content-Length")
    if not answer.headers.get("Last-Modified", "GMT").endswith("GMT"):
        return True
    if length is None:
        whole = answer.status_code in {204, 304} or "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
        return not whole
    if not length.isdecimal():
        return True
    return not request.stream_output and request.method != "HEAD" and len(answer.content) != int(length)


def shared_client() -> S3Client:
    """Return the client of this process for the settings that the environment holds now.

    Building a client takes 50 ms and opens new connections; clients are safe to share between threads. Other settings
    (endpoint, region, account, proxy) give another client, and so does a forked process: sockets must not be shared
    with the parent.
    """
    return _client_of(os.getpid(), _settings_digest())


@lru_cache(maxsize=8)  # a process uses one or two accounts; an evicted client lives as long as its stores
def _client_of(_process: int, _settings: str) -> S3Client:
    return make_client()


def _settings_digest() -> str:
    """Digest what a client is built from; a digest, so that no cache or traceback can show a secret."""
    found = [
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(("AWS_", PREFIX)) or name.lower().endswith("_proxy") or name == "REQUESTS_CA_BUNDLE"
    ]
    for name, default in _CREDENTIAL_FILES.items():
        with suppress(OSError):
            path = Path(os.environ.get(name, default)).expanduser()
            found.append((str(path), str(path.stat().st_mtime_ns)))
    return sha256_bytes(repr(found).encode())


class S3Store:
    """A bucket, or a folder of one (`prefix`), as a `FileStore`.

    Region and credentials come from the environment, as in `make_client`, unless a client is given. Every method raises
    StoreError if the store is unreachable or refuses the credentials.
    """

    def __init__(
        self, bucket: str, prefix: str = "", endpoint: str | None = None, client: S3Client | None = None
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._client = client or make_client(endpoint)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    @property
    def uri(self) -> str:
        """The address of the store, such as `s3://bucket/prefix`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def endpoint(self) -> str:
        """The URL of the S3 server."""
        return self._client.meta.endpoint_url

    @property
    def native(self) -> tuple[S3Client, str, str]:
        """Client, bucket and prefix, for operations that only S3 has (`erase`)."""
        return self._client, self._bucket, self._prefix

    def translating(self, doing: str, key: str) -> AbstractContextManager[None]:
        """Turn botocore's errors in a block into `cannot <doing> s3://bucket/prefix/key` and its cause."""
        return translated(f"cannot {doing} {self._address(key)}", self.endpoint)

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _address(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def get(self, key: str) -> StoredObject | None:
        """Return an object, or None if it does not exist; IntegrityError if it is larger than 64 MiB or damaged."""
        found = self._fetch(key)
        return found[0] if found else None

    def _fetch(self, key: str) -> tuple[StoredObject, str] | None:
        """Return an object and the token of its writer."""
        full = self._full(key)

        def read() -> tuple[StoredObject, str]:
            answer = self._client.get_object(Bucket=self._bucket, Key=full)
            if answer.get("ContentLength", 0) > MAX_DOCUMENT_BYTES:
                raise IntegrityError(
                    f"{self._address(key)} is too large for a document",
                    f"it has {answer['ContentLength']} bytes, the limit is {MAX_DOCUMENT_BYTES}",
                    "check what wrote it",
                )
            if not {"ContentLength", "ETag", "LastModified"} <= answer.keys():  # the headers broke off
                raise ReadTimeoutError(endpoint_url=self.endpoint, error="the answer broke off")
            served: datetime | None = None
            with suppress(KeyError, ValueError):  # a proxy may drop the header
                served = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)
            modified = answer["LastModified"].astimezone(UTC)
            stored = StoredObject(answer["Body"].read(), answer["ETag"], modified, served)
            return stored, answer["Metadata"].get(_WRITER, "")

        with self.translating("read", key):
            return _read_whole(read)

    def read_start(self, key: str, size: int) -> bytes | None:
        """Return the first `size` bytes of an object (all, if it has fewer), or None if it does not exist."""
        full = self._full(key)

        def read() -> bytes:
            try:
                range_ = f"bytes=0-{size - 1}"
                answer = self._client.get_object(Bucket=self._bucket, Key=full, Range=range_)
                return answer["Body"].read()
            except ClientError as error:
                if code_of(error) == "InvalidRange":  # the object is empty
                    return b""
                raise

        with self.translating("read", key):
            return _read_whole(read)

    def read_range(self, key: str, start: int, size: int, etag: str) -> bytes | None:
        """Return `size` bytes of an object from `start` on; None if it does not exist or has another etag.

        `start` must lie before the object's end, and `size` be at least 1.
        """
        full = self._full(key)

        def read() -> bytes | None:
            range_ = f"bytes={start}-{start + size - 1}"
            answer = self._client.get_object(Bucket=self._bucket, Key=full, Range=range_)
            if not answer.get("ETag", "").endswith('"'):  # the headers broke off
                raise ReadTimeoutError(endpoint_url=self.endpoint, error="the answer broke off")
            if answer["ETag"] != etag:  # not every store knows the condition If-Match for reading
                answer["Body"].close()
                return None
            return answer["Body"].read()

        with self.translating("read", key):
            try:
                return _read_whole(read)
            except ClientError as error:
                if code_of(error) == "InvalidRange":  # it was replaced by a smaller one
                    return None
                raise

    def put_new(self, key: str, data: bytes) -> str:
        """Create an object and return its etag; creating it again with the same bytes succeeds.

        ConflictError if the object exists with other bytes.
        """
        return self._write(key, data, None)

    def put_if(self, key: str, data: bytes, etag: str) -> str:
        """Replace an object if its etag is still the given one (else ConflictError), and return the new etag."""
        return self._write(key, data, etag)

    def _write(self, key: str, data: bytes, etag: str | None) -> str:
        writer = secrets.token_hex(16)  # botocore's retries of this call share it
        unclear: StoreError | None = None
        try:
            written = self.try_put(key, data, etag, writer)
            if written is not None:
                return written
        except StoreError as error:
            if not is_unclear(error.__cause__):
                raise
            unclear = error
        return self._settle(key, data, etag, writer, unclear)

    def _settle(self, key: str, data: bytes, etag: str | None, writer: str, unclear: StoreError | None) -> str:
        """Find out from the object whether a write was done."""
        try:
            found = self._fetch(key)
        except StoreError:
            if unclear:
                raise unclear from unclear.__cause__
            raise
        if found and (found[1] == writer or (etag is None and found[0].data == data)):
            return found[0].etag
        if unclear:
            raise unclear
        raise conflict(self._address(key), etag, gone=found is None)

    def try_put(self, key: str, data: bytes, etag: str | None = None, writer: str = "") -> str | None:
        """Send one conditional write and return the new etag, or None if its condition was false.

        It does not read the object back: `probe` tests this bare operation. An etag of None means that the object must
        not exist; `writer` is a token stored with it.
        """
        full = self._full(key)
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with self.translating("write", key):
            for attempt in range(_RACE_ATTEMPTS):
                try:
                    answer = self._client.put_object(
                        Bucket=self._bucket,
                        Key=full,
                        Body=data,
                        ChecksumAlgorithm="SHA256",
                        Metadata={_WRITER: writer} if writer else {},
                        **condition,
                    )
                    if not str(answer.get("ETag", "")).endswith('"'):  # the headers broke off: read it back
                        raise ConnectionClosedError(endpoint_url=self.endpoint, error="the answer has no etag")
                    return answer["ETag"]
                except ClientError as error:
                    if status_of(error) == 412 or (etag is not None and code_of(error) == "NoSuchKey"):
                        return None
                    if status_of(error) != 409:
                        raise
                _pause(attempt)
        raise StoreError(
            f"cannot write {self._address(key)}",
            f"the store answered 'conflicting request' (409) {_RACE_ATTEMPTS} times",
            "run it again when fewer writers are at work",
        )

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose key starts with a prefix (empty for all), in key order."""
        if prefix.rstrip("/"):
            check_key(prefix.rstrip("/"))
        skip = len(self._prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self.translating("list", prefix):
            found = [
                Entry(row["Key"][skip:], row["Size"], row["LastModified"].astimezone(UTC), row["ETag"])
                for page in pages
                for row in rows_of(page, "Contents")
            ]
        # Not every store lists in key order (SeaweedFS puts `a/b` before `a-b`).
        yield from sorted(found, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Delete an object; deleting one that does not exist succeeds."""
        full = self._full(key)
        with self.translating("delete", key):
            try:
                self._client.delete_object(Bucket=self._bucket, Key=full)
            except ClientError as error:
                if not is_missing(error):
                    raise

    def upload(self, path: Path, key: str) -> None:
        """Upload a file, in parts of 16 MiB if it has more than 32 MiB; the store checks the SHA-256 of each part."""
        full, what = self._full(key), f"cannot upload {path.name} to {self._address(key)}"
        with translated(what, self.endpoint):
            try:
                extra = {"ChecksumAlgorithm": "SHA256"}
                self._client.upload_file(str(path), self._bucket, full, ExtraArgs=extra, Config=_TRANSFER)
            except OSError as error:
                raise disk_error(what, path, error) from error
            except (Boto3Error, ClientError) as error:
                # If the reply to the last step is lost, botocore's retry finds the upload closed.
                if "NoSuchUpload" not in str(error) or self._size(full) != path.stat().st_size:
                    raise

    def copy(self, source: str, target: str) -> bool:
        """Copy an object within the store, replacing the target, and return whether the source exists."""
        origin: CopySourceTypeDef = {"Bucket": self._bucket, "Key": self._full(source)}
        full = self._full(target)
        with self.translating("copy", source):
            try:
                self._client.copy(origin, self._bucket, full, Config=_COPY)
            except ClientError as error:
                if is_missing(error):
                    return False
                raise
        return True

    def _size(self, full: str) -> int | None:
        try:
            return self._client.head_object(Bucket=self._bucket, Key=full)["ContentLength"]
        except (ClientError, BotoCoreError):
            return None

    def download(self, key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        """Download to a file, which appears complete or not at all.

        `on_bytes` gets the number of bytes that arrived since its last call, from several threads.
        """
        full, what = self._full(key), f"cannot download {self._address(key)}"
        part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
        with translated(what, self.endpoint):
            try:
                with part.open("wb") as file:
                    self._client.download_fileobj(self._bucket, full, file, Callback=on_bytes, Config=_TRANSFER)
                part.replace(path)
            except OSError as error:
                raise disk_error(what, path, error) from error
            finally:
                part.unlink(missing_ok=True)


def _read_whole(read: Callable[[], T]) -> T | None:
    """Read an object again if its body breaks off: botocore retries requests, but not the reading of a body."""
    attempt = 0
    while True:
        try:
            return read()
        except _CUT_OFF:
            attempt += 1
            if attempt == _READ_ATTEMPTS:
                raise
            _pause(attempt)
        except ClientError as error:
            if is_missing(error):
                return None
            raise


def _pause(attempt: int) -> None:
    """Wait 50 ms, 100 ms and so on up to 2 s, with jitter, so that racing writers do not stay in step."""
    time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.05 * 2**attempt))
