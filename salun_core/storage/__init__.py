"""The object store: keys, conditional documents, content-addressed files, leases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salun_core.storage.keys import split_uri
from salun_core.storage.objects import Entry, FileStore, ObjectStore, StoredObject

if TYPE_CHECKING:
    from salun_core.storage.s3 import S3Store

__all__ = ["Entry", "FileStore", "ObjectStore", "StoredObject", "open_store", "split_uri"]


def open_store(uri: str) -> S3Store:
    """Open `s3://bucket` or `s3://bucket/prefix` without a request; stores with the same settings share one client.

    The endpoint comes from SALUN_S3_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; region and credentials from
    the other SALUN_S3_* and AWS_* variables.
    """
    bucket, prefix = split_uri(uri)
    from salun_core.storage.s3 import S3Store, shared_client  # importing boto3 takes 0.2 s

    return S3Store(bucket, prefix, client=shared_client())
