"""The object store: keys, conditional documents, content-addressed files, leases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salun_core.errors import UsageError
from salun_core.storage.keys import split_uri
from salun_core.storage.objects import Entry, FileStore, ObjectStore, StoredObject

if TYPE_CHECKING:
    from salun_core.storage.s3 import S3Store

__all__ = ["Entry", "FileStore", "ObjectStore", "StoredObject", "open_pipeline_root", "open_store", "split_uri"]


def open_store(uri: str) -> S3Store:
    """Open a store by its address, without sending a request. Stores with the same settings share one client.

    Args:
        uri: `s3://bucket` or `s3://bucket/prefix`. The endpoint comes from SALUN_S3_ENDPOINT_URL, AWS_ENDPOINT_URL_S3
            or AWS_ENDPOINT_URL; region and credentials from the other SALUN_S3_* and AWS_* variables.

    Raises:
        UsageError: the address is not valid; the remedy suggests the nearest valid one.

    Example:
        >>> open_store("s3://models/production").uri
        's3://models/production'
    """
    bucket, prefix = split_uri(uri)
    from salun_core.storage.s3 import S3Store, shared_client  # importing boto3 takes 0.2 s

    return S3Store(bucket, prefix, client=shared_client())


def open_pipeline_root(uri: str) -> S3Store:
    """Open Kubeflow's own store by its address, without sending a request.

    Args:
        uri: its pipeline root, such as `s3://mlpipeline/v2/artifacts`. Endpoint, region and credentials come from
            SALUN_KFP_S3_*; what is not set there is as for `open_store`.

    Raises:
        UsageError: the address is not valid, or has a query.
        StoreError: the settings in the environment are wrong.
    """
    from salun_core.storage.s3_settings import KFP_PREFIX, kfp_settings, own_settings

    if "?" in uri:  # Kubeflow's own settings may have one; read as a part of the key, it would name an empty folder
        raise UsageError(
            f"{uri.partition('?')[0]!r} contains a query",
            "the address of a store has none",
            "leave it out; set SALUN_KFP_S3_ENDPOINT_URL and SALUN_KFP_S3_REGION instead",
        )
    if not own_settings(KFP_PREFIX):
        return open_store(uri)
    bucket, prefix = split_uri(uri)
    from salun_core.storage.s3 import S3Store, make_client

    return S3Store(bucket, prefix, client=make_client(settings=kfp_settings()))
