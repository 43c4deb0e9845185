"""Erases objects for good: every version and delete marker of a key, and the parts of unfinished uploads.

In a bucket that keeps versions, a plain delete hides an object and keeps its bytes. Every function raises StoreError
if the store is unreachable or refuses the credentials.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from salun_core.storage.keys import check_key
from salun_core.storage.s3_errors import code_of, is_missing, rows_of

if TYPE_CHECKING:
    from salun_core.storage.s3 import S3Store

_UNSUPPORTED = {"NotImplemented", "MethodNotAllowed", "501", "405"}


@dataclass(frozen=True)
class StoredVersion:
    """One S3 version of an object, or a delete marker.

    Args:
        key: relative to the store's prefix.
        version: S3's id of it; empty if the store keeps no versions.
        size: in bytes; 0 for a delete marker.
        modified: the server's time of its writing (UTC).
    """

    key: str
    version: str
    size: int
    modified: datetime
    latest: bool
    marker: bool = False


@dataclass(frozen=True)
class StoredKey:
    """Everything that the store holds under one key.

    Args:
        key: relative to the store's prefix.
        size: bytes of all its versions.
        modified: the server's time of the newest (UTC).
        live: whether a plain read finds it.
        old: how many versions and delete markers are older than the latest one.
        replaced: when the first of these was replaced or hidden (UTC); None without any.
    """

    key: str
    size: int
    modified: datetime
    live: bool = True
    old: int = 0
    replaced: datetime | None = None


@dataclass(frozen=True)
class Erased:
    """What was removed: how many keys, how many versions and delete markers, and the bytes of all versions."""

    keys: int = 0
    versions: int = 0
    bytes: int = 0

    def __add__(self, other: Erased) -> Erased:
        return Erased(self.keys + other.keys, self.versions + other.versions, self.bytes + other.bytes)


@dataclass(frozen=True)
class Upload:
    """An unfinished multipart upload: key, S3's id of it, and when it began (UTC)."""

    key: str
    id: str
    initiated: datetime


def versions_under(store: S3Store, prefix: str = "") -> Iterator[StoredVersion]:
    """Yield every version and delete marker under a prefix (empty for all), page by page, in the order of the store."""
    client, bucket, root = store.native
    pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=root + prefix)
    with store.translating("list the versions in", prefix):
        try:
            for page in pages:
                yield from (_stored_version(row, len(root)) for row in rows_of(page, "Versions"))
                yield from (_stored_version(row, len(root), marker=True) for row in rows_of(page, "DeleteMarkers"))
            return
        except ClientError as error:  # at the first page: a store that has no versions
            if code_of(error) not in _UNSUPPORTED:
                raise
    for entry in store.list(prefix):
        yield StoredVersion(entry.key, "", entry.size, entry.modified, latest=True)


def _stored_version(row: Any, skip: int, *, marker: bool = False) -> StoredVersion:  # noqa: ANN401 - a row of boto3
    modified, latest = row["LastModified"].astimezone(UTC), bool(row["IsLatest"])
    return StoredVersion(row["Key"][skip:], row["VersionId"], row.get("Size", 0), modified, latest, marker)


def versions_of(store: S3Store, key: str) -> list[StoredVersion]:
    """Return every version and delete marker of one key, the newest first."""
    found = [item for item in versions_under(store, check_key(key)) if item.key == key]
    return sorted(found, key=lambda item: (item.latest, item.modified), reverse=True)


def stored_keys(store: S3Store, prefix: str = "") -> list[StoredKey]:
    """Return what is stored under a prefix, sorted by key, including what a plain delete has only hidden."""
    grouped: dict[str, list[StoredVersion]] = {}
    for item in versions_under(store, prefix):
        grouped.setdefault(item.key, []).append(item)
    return [
        StoredKey(
            key,
            size=sum(item.size for item in items),
            modified=max(item.modified for item in items),
            live=any(item.latest and not item.marker for item in items),
            old=sum(not item.latest for item in items),
            replaced=min((at for _, at in _replaced(items)), default=None),
        )
        for key, items in sorted(grouped.items())
    ]


def erase(store: S3Store, key: str) -> Erased:
    """Delete an object with all its versions and delete markers; a missing object is not an error.

    The latest version goes last, so that a kill in between leaves a key that an ordinary listing still shows. Longer
    keys that begin with this key stay.
    """
    return _remove(store, sorted(versions_of(store, key), key=lambda item: item.latest))


def erase_old(store: S3Store, key: str, before: datetime | None = None) -> Erased:
    """Delete all versions and delete markers of an object but the latest; longer keys that begin with its key stay.

    With `before`, only what was replaced or hidden before this time, and then a delete marker with nothing to hide.
    """
    found = versions_of(store, key)
    gone = [item for item, at in _replaced(found) if before is None or at < before]
    left = [item for item in found if item not in gone]
    if before is not None and len(left) == 1 and left[0].marker and left[0].modified < before:
        gone += left
    return _remove(store, gone)


def _replaced(items: Iterable[StoredVersion]) -> list[tuple[StoredVersion, datetime]]:
    """Return the versions of one key that are not the latest, each with the time at which it was replaced or hidden."""
    newest = sorted(items, key=lambda item: (item.latest, item.modified), reverse=True)
    return [(item, newer.modified) for newer, item in pairwise(newest)]


def unfinished_uploads(store: S3Store, older_than: datetime, prefix: str = "") -> list[Upload]:
    """Return the multipart uploads below the store's prefix that began before a time, sorted by key.

    A younger upload may still be in progress.
    """
    client, bucket, root = store.native
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=root + prefix)
    with store.translating("list the unfinished uploads in", prefix):
        try:
            rows = [row for page in pages for row in page.get("Uploads", [])]
        except ClientError as error:
            if code_of(error) not in _UNSUPPORTED:
                raise
            rows = []
    found = [Upload(row["Key"][len(root) :], row["UploadId"], row["Initiated"].astimezone(UTC)) for row in rows]
    return sorted((item for item in found if item.initiated < older_than), key=lambda item: (item.key, item.id))


def upload_bytes(store: S3Store, upload: Upload) -> int:
    """Return how many bytes the parts of an unfinished upload hold; 0 if it is gone."""
    client, bucket, root = store.native
    pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=root + upload.key, UploadId=upload.id)
    with store.translating("list the parts of", upload.key):
        try:
            return sum(part["Size"] for page in pages for part in page.get("Parts", []))
        except ClientError as error:
            if _is_gone(error):
                return 0
            raise


def abort(store: S3Store, upload: Upload) -> Erased:
    """End an unfinished upload and remove its parts; one that is gone is not an error."""
    client, bucket, root = store.native
    size = upload_bytes(store, upload)
    with store.translating("abort the upload of", upload.key):
        try:
            client.abort_multipart_upload(Bucket=bucket, Key=root + upload.key, UploadId=upload.id)
        except ClientError as error:
            if not _is_gone(error):
                raise
            return Erased()
    return Erased(1, 1, size)


def _is_gone(error: ClientError) -> bool:
    return is_missing(error) or code_of(error) in {"NoSuchUpload", "NoSuchVersion"}


def _remove(store: S3Store, items: list[StoredVersion]) -> Erased:
    client, bucket, root = store.native
    for item in items:
        with store.translating("erase", item.key):
            try:
                if item.version:  # "null" too: without an id, a delete only adds a marker in a bucket with versions
                    client.delete_object(Bucket=bucket, Key=root + item.key, VersionId=item.version)
                else:
                    client.delete_object(Bucket=bucket, Key=root + item.key)
            except ClientError as error:
                if not _is_gone(error):
                    raise
    return Erased(len({item.key for item in items}), len(items), sum(item.size for item in items))
