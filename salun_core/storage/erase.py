"""Erases objects for good: every version and delete marker of a key, and the parts of uploads that never ended.

In a bucket that keeps versions, a plain delete hides an object and leaves its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from salun_core.storage.keys import check_key
from salun_core.storage.s3_errors import code_of, is_missing, translated

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from salun_core.storage.s3 import S3Store

_UNSUPPORTED = {"NotImplemented", "MethodNotAllowed", "501", "405"}


@dataclass(frozen=True)
class StoredVersion:
    """One S3 version of an object, or a delete marker.

    Args:
        key: relative to the store's prefix.
        version: S3's id of it; empty where the store keeps no versions.
        size: in bytes; 0 for a delete marker.
        modified: the server's time of its writing (UTC).
        latest: whether it is what a plain read finds.
        marker: whether it only says that the object was deleted.
    """

    key: str
    version: str
    size: int
    modified: datetime
    latest: bool
    marker: bool = False


@dataclass(frozen=True)
class StoredKey:
    """All that the store holds under one key.

    Args:
        key: relative to the store's prefix.
        size: bytes of all its versions.
        modified: the server's time of the newest (UTC).
        live: whether a plain read finds it.
        old: how many versions and delete markers lie below the latest one.
    """

    key: str
    size: int
    modified: datetime
    live: bool = True
    old: int = 0


@dataclass(frozen=True)
class Erased:
    """What was removed.

    Args:
        keys: how many keys had something.
        versions: how many versions and delete markers.
        bytes: of all versions together.
    """

    keys: int = 0
    versions: int = 0
    bytes: int = 0

    def __add__(self, other: Erased) -> Erased:
        return Erased(self.keys + other.keys, self.versions + other.versions, self.bytes + other.bytes)


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and not ended: key, S3's id of it, and when it was begun (UTC)."""

    key: str
    id: str
    initiated: datetime


def versions_of(store: S3Store, key: str) -> list[StoredVersion]:
    """Return every version and delete marker of one key, the newest first.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    found = [item for item in _versions(store, check_key(key)) if item.key == key]
    return sorted(found, key=lambda item: (item.latest, item.modified), reverse=True)


def stored_keys(store: S3Store, prefix: str = "") -> list[StoredKey]:
    """Return what lies under a prefix, sorted by key; what a plain delete has only hidden is listed too.

    Args:
        store: where.
        prefix: the start of the keys; empty for all.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    grouped: dict[str, list[StoredVersion]] = {}
    for item in _versions(store, prefix):
        grouped.setdefault(item.key, []).append(item)
    return [
        StoredKey(
            key,
            size=sum(item.size for item in items),
            modified=max(item.modified for item in items),
            live=any(item.latest and not item.marker for item in items),
            old=sum(not item.latest for item in items),
        )
        for key, items in sorted(grouped.items())
    ]


def erase(store: S3Store, key: str) -> Erased:
    """Delete an object with all its versions and delete markers; nothing there is no error.

    The latest version goes last: whoever is killed midway leaves a key that an ordinary listing still shows.

    Args:
        store: where.
        key: exactly this key; others that begin like it are left alone.

    Returns:
        What was removed.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    return _remove(store, sorted(versions_of(store, key), key=lambda item: item.latest))


def erase_old(store: S3Store, key: str) -> Erased:
    """Delete all versions and delete markers of an object but the latest; raises as `erase`."""
    return _remove(store, [item for item in versions_of(store, key) if not item.latest])


def unfinished_uploads(store: S3Store, older_than: datetime, prefix: str = "") -> list[Upload]:
    """Return the multipart uploads below the store's prefix that were begun before a time, sorted by key.

    Args:
        store: where.
        older_than: with its time zone; a younger upload may still be running.
        prefix: the start of the keys; empty for all.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    client, bucket, root = store.native
    with _translated(store, "list the unfinished uploads in", prefix):
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=root + prefix)
        rows: list[Any] = _supported(lambda: [row for page in pages for row in page.get("Uploads", [])])
    found = [Upload(row["Key"][len(root) :], row["UploadId"], row["Initiated"].astimezone(UTC)) for row in rows]
    return sorted((item for item in found if item.initiated < older_than), key=lambda item: (item.key, item.id))


def upload_bytes(store: S3Store, upload: Upload) -> int:
    """Return how many bytes the parts of an unfinished upload hold; 0 where it is gone."""
    client, bucket, root = store.native
    with _translated(store, "list the parts of", upload.key):
        pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=root + upload.key, UploadId=upload.id)
        try:
            return sum(part["Size"] for page in pages for part in page.get("Parts", []))
        except ClientError as error:
            if code_of(error) == "NoSuchUpload" or is_missing(error):
                return 0
            raise


def abort(store: S3Store, upload: Upload) -> Erased:
    """End an unfinished upload and remove its parts; one that is gone is no error.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    client, bucket, root = store.native
    size = upload_bytes(store, upload)
    with _translated(store, "abort the upload of", upload.key):
        try:
            client.abort_multipart_upload(Bucket=bucket, Key=root + upload.key, UploadId=upload.id)
        except ClientError as error:
            if code_of(error) != "NoSuchUpload" and not is_missing(error):
                raise
            return Erased()
    return Erased(1, 1, size)


def _versions(store: S3Store, prefix: str) -> Iterator[StoredVersion]:
    client, bucket, root = store.native
    with _translated(store, "list the versions in", prefix):
        pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=root + prefix)
        found = _supported(lambda: [item for page in pages for item in _rows(page, len(root))], None)
    if found is None:
        found = [StoredVersion(row.key, "", row.size, row.modified, latest=True) for row in store.list(prefix)]
    yield from found


def _rows(page: Any, skip: int) -> Iterator[StoredVersion]:  # noqa: ANN401 - a page of boto3's
    for kind in ("Versions", "DeleteMarkers"):
        for row in page.get(kind, []):
            modified = row["LastModified"].astimezone(UTC)
            yield StoredVersion(
                row["Key"][skip:],
                row["VersionId"],
                row.get("Size", 0),
                modified,
                bool(row["IsLatest"]),
                marker=kind == "DeleteMarkers",
            )


def _supported(call: Callable[[], Any], otherwise: Any = ()) -> Any:  # noqa: ANN401 - whatever the call returns
    try:
        return call()
    except ClientError as error:
        if code_of(error) in _UNSUPPORTED:
            return otherwise
        raise


def _remove(store: S3Store, items: list[StoredVersion]) -> Erased:
    client, bucket, root = store.native
    for item in items:
        with _translated(store, "erase", item.key):
            _remove_one(client, bucket, root + item.key, item.version)
    return Erased(len({item.key for item in items}), len(items), sum(item.size for item in items))


def _remove_one(client: S3Client, bucket: str, key: str, version: str) -> None:
    try:
        if version:  # "null" too: without its id a delete would only add a marker where versions are kept
            client.delete_object(Bucket=bucket, Key=key, VersionId=version)
        else:
            client.delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if not is_missing(error) and code_of(error) != "NoSuchVersion":
            raise


def _translated(store: S3Store, doing: str, key: str) -> AbstractContextManager[None]:
    return translated(f"cannot {doing} {store.uri}/{key}", store.endpoint)
