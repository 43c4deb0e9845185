"""The object store on S3: conditional writes for documents, managed transfers for files."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from salun_core.config import MAX_DOCUMENT_BYTES
from salun_core.errors import IntegrityError, StoreError
from salun_core.storage.keys import check_key
from salun_core.storage.local_files import disk_error
from salun_core.storage.objects import Entry, StoredObject
from salun_core.storage.s3_errors import code_of, conflict, is_missing, is_unclear, status_of, translated

if TYPE_CHECKING:
    from pathlib import Path

    from types_boto3_s3 import S3Client


def make_client(endpoint: str | None = None) -> S3Client:
    """Build a client with bounded retries and timeouts.

    Args:
        endpoint: URL of the store; None takes AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or AWS itself.

    Raises:
        StoreError: the settings in the environment are wrong.
    """
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 5},
        max_pool_connections=64,
        response_checksum_validation="when_supported",  # whatever the environment says: it catches a flipped bit
    )
    try:
        with translated("cannot set up the S3 client", endpoint or "the store"):
            # A session of its own: boto3's default one keeps the first credentials for ever.
            return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:  # botocore's answer to an endpoint that is no URL
        raise StoreError(
            "cannot set up the S3 client",
            str(error),
            "set AWS_ENDPOINT_URL to http://host:port or https://host",
        ) from error


def date_of(headers: Mapping[str, str]) -> datetime | None:
    """Return the server's time of an answer in UTC; None where a proxy dropped it or it is no date."""
    try:
        return parsedate_to_datetime(headers["date"]).astimezone(UTC)
    except (KeyError, ValueError):
        return None


_PART = 16 * 1024 * 1024
_TRANSFER = TransferConfig(multipart_threshold=2 * _PART, multipart_chunksize=_PART, max_concurrency=4)
_READ_ATTEMPTS = 4


def upload_file(client: S3Client, bucket: str, key: str, path: Path) -> None:
    """Upload a file, in parts of 16 MiB where it is over 32 MiB.

    Raises:
        OSError: the file cannot be read.
        Boto3Error: the transfer failed.
    """
    size = path.stat().st_size
    try:
        extra = {"ChecksumAlgorithm": "SHA256"}
        client.upload_file(str(path), bucket, key, ExtraArgs=extra, Config=_TRANSFER)
    except (Boto3Error, ClientError) as error:
        # The reply to the last step may be lost; its retry then finds the upload closed.
        if "NoSuchUpload" not in str(error) or _size(client, bucket, key) != size:
            raise


def _size(client: S3Client, bucket: str, key: str) -> int | None:
    try:
        return client.head_object(Bucket=bucket, Key=key)["ContentLength"]
    except (ClientError, BotoCoreError):
        return None


def download_file(client: S3Client, bucket: str, key: str, path: Path) -> None:
    """Download beside the target and rename; nothing is left when it is interrupted.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        ClientError: there is no such object, or the store refuses us.
        RetriesExceededError: the transfer broke off again and again.
    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with part.open("wb") as file:
            client.download_fileobj(bucket, key, file, Config=_TRANSFER)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_start(client: S3Client, bucket: str, key: str, size: int) -> bytes | None:
    """Return the first `size` bytes of an object (all, where it has fewer), or None where there is none.

    Raises:
        ClientError: the store refuses us.
        BotoCoreError: the store cannot be reached, or the answer broke off each time.
    """
    for attempt in range(_READ_ATTEMPTS):
        try:
            return client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")["Body"].read()
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            if attempt == _READ_ATTEMPTS - 1:
                raise
        except ClientError as error:
            if is_missing(error):
                return None
            if code_of(error) == "InvalidRange":  # it is empty
                return b""
            raise
    raise AssertionError("the loop returns or raises")


_WRITER = "salun-writer"
_RACE_ATTEMPTS = 8
_READ_ATTEMPTS_S3 = 4
_CUT_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0.5, 1.0) * min(2.0, 0.05 * 2**attempt))


class S3Store:
    """A bucket, or a folder of one, as a `FileStore`.

    Region and credentials come from the usual AWS variables.

    Args:
        bucket: name of the bucket.
        prefix: folder that all keys are relative to; empty for the whole bucket.
        endpoint: URL of the store; None takes it from the environment.
        client: a ready client, in place of one built here.
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
        """The URL that the store is reached at."""
        return self._client.meta.endpoint_url

    @property
    def native(self) -> tuple[S3Client, str, str]:
        """Client, bucket and prefix, for what S3 alone can do (`erase`)."""
        return self._client, self._bucket, self._prefix

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _address(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def get(self, key: str) -> StoredObject | None:
        """Return an object, or None where there is none of that key.

        Raises:
            StoreError: the store cannot be reached, refuses us, or the object is no document (over 64 MiB).
            IntegrityError: the bytes do not match the store's own checksum.
        """
        found = self._fetch(key)
        return found[0] if found else None

    def _fetch(self, key: str) -> tuple[StoredObject, str] | None:
        """Return an object and the token of its writer."""
        full = self._full(key)
        with translated(f"cannot read {self._address(key)}", self.endpoint):
            for attempt in range(_READ_ATTEMPTS_S3):
                try:
                    return self._fetch_once(full)
                except _CUT_OFF:  # botocore retries a request, not the reading of its body
                    if attempt == _READ_ATTEMPTS_S3 - 1:
                        raise
                    _pause(attempt)
                except ClientError as error:
                    if is_missing(error):
                        return None
                    raise
        raise AssertionError("the loop returns or raises")

    def _fetch_once(self, full: str) -> tuple[StoredObject, str]:
        answer = self._client.get_object(Bucket=self._bucket, Key=full)
        if answer["ContentLength"] > MAX_DOCUMENT_BYTES:
            raise IntegrityError(
                f"s3://{self._bucket}/{full} is too large for a document",
                f"{answer['ContentLength']} bytes, at most {MAX_DOCUMENT_BYTES}",
                "check what wrote it",
            )
        served = date_of(answer["ResponseMetadata"]["HTTPHeaders"])
        modified = answer["LastModified"].astimezone(UTC)
        stored = StoredObject(answer["Body"].read(), answer["ETag"], modified, served)
        return stored, answer["Metadata"].get(_WRITER, "")

    def put_new(self, key: str, data: bytes) -> str:
        """Create an object and return its etag; the same bytes a second time are no conflict.

        Raises:
            ConflictError: an object of that key exists and holds other bytes.
            StoreError: the store cannot be reached or refuses us.
        """
        return self._write(key, data, None)

    def put_if(self, key: str, data: bytes, etag: str) -> str:
        """Replace an object if its etag is still the given one, and return the new etag.

        Raises:
            ConflictError: the object changed, or is gone.
            StoreError: the store cannot be reached or refuses us.
        """
        return self._write(key, data, etag)

    def _write(self, key: str, data: bytes, etag: str | None) -> str:
        """Write with a condition; a reply that was lost on the way does not count as a conflict.

        When the store commits and its reply is lost, botocore sends the request again and is told 412
        about our own write. The token of this call, which botocore's retries share, tells it apart.
        """
        writer = secrets.token_hex(16)
        unclear: StoreError | None = None
        try:
            written = self.try_put(key, data, etag, writer)
            if written is not None:
                return written
        except StoreError as error:
            if not (error.__cause__ and is_unclear(error.__cause__)):  # type: ignore[arg-type]
                raise
            unclear = error
        return self._settle(key, data, etag, writer, unclear)

    def _settle(self, key: str, data: bytes, etag: str | None, writer: str, unclear: StoreError | None) -> str:
        """Find out what became of a write by reading the object back."""
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
        """Send one conditional write and return the new etag, or None where the condition was false.

        This is the bare operation: it does not look whose write the store holds (`probe` needs that).

        Args:
            key: the key, relative to the prefix.
            data: the bytes.
            etag: what the object must have now; None if it must not exist.
            writer: a token kept beside the object.

        Raises:
            StoreError: the store cannot be reached or refuses us, or the race does not end.
        """
        full = self._full(key)
        with translated(f"cannot write {self._address(key)}", self.endpoint):
            for attempt in range(_RACE_ATTEMPTS):
                try:
                    return self._put_once(full, data, etag, writer)
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

    def _put_once(self, full: str, data: bytes, etag: str | None, writer: str) -> str:
        put, metadata = self._client.put_object, {_WRITER: writer} if writer else {}
        if etag is None:
            return put(
                Bucket=self._bucket,
                Key=full,
                Body=data,
                ChecksumAlgorithm="SHA256",
                Metadata=metadata,
                IfNoneMatch="*",
            )["ETag"]
        return put(
            Bucket=self._bucket,
            Key=full,
            Body=data,
            ChecksumAlgorithm="SHA256",
            Metadata=metadata,
            IfMatch=etag,
        )["ETag"]

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects whose key starts with a prefix, in key order.

        Args:
            prefix: the start of the keys, relative to the store's prefix; empty for all.

        Raises:
            StoreError: the store cannot be reached or refuses us.
        """
        if prefix.rstrip("/"):
            check_key(prefix.rstrip("/"))
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with translated(f"cannot list {self._address(prefix)}", self.endpoint):
            found = [
                Entry(
                    row["Key"][len(self._prefix) :],
                    row["Size"],
                    row["LastModified"].astimezone(UTC),
                    row["ETag"],
                )
                for page in pages
                for row in page.get("Contents", [])
            ]
        # Not every store lists in key order (SeaweedFS puts `a/b` before `a-b`).
        yield from sorted(found, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Delete an object; deleting one that does not exist is no error.

        Raises:
            StoreError: the store cannot be reached or refuses us.
        """
        with translated(f"cannot delete {self._address(key)}", self.endpoint):
            try:
                self._client.delete_object(Bucket=self._bucket, Key=self._full(key))
            except ClientError as error:
                if not is_missing(error):
                    raise

    def upload(self, path: Path, key: str) -> None:
        """Upload a file, in parts where it is large; the store checks the SHA-256 of each part.

        Raises:
            StoreError: the file cannot be read, or the store cannot be reached or refuses us.
        """
        what = f"cannot upload {path.name} to {self._address(key)}"
        with translated(what, self.endpoint):
            try:
                upload_file(self._client, self._bucket, self._full(key), path)
            except OSError as error:
                raise disk_error(what, path, error) from error

    def download(self, key: str, path: Path) -> None:
        """Download to a file, which appears whole or not at all.

        Raises:
            StoreError: there is no object of that key, the disk is full, or the store cannot be reached.
        """
        what = f"cannot download {self._address(key)}"
        with translated(what, self.endpoint):
            try:
                download_file(self._client, self._bucket, self._full(key), path)
            except OSError as error:
                raise disk_error(what, path, error) from error

    def read_start(self, key: str, size: int) -> bytes | None:
        """Return the first `size` bytes of an object (all, where it has fewer), or None where there is none."""
        with translated(f"cannot read {self._address(key)}", self.endpoint):
            return read_start(self._client, self._bucket, self._full(key), size)
