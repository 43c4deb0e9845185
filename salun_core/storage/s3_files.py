"""Moves files between a disk and S3, whole or not at all."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from salun_core.storage.s3_errors import code_of, is_missing

if TYPE_CHECKING:
    from pathlib import Path

    from types_boto3_s3 import S3Client

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
