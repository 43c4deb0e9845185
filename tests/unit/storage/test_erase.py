"""On a real server, in a bucket that keeps versions and in one that does not."""

import secrets
from datetime import UTC, datetime, timedelta

import pytest
from botocore.exceptions import ClientError

from salun_core.errors import StoreError
from salun_core.storage.erase import (
    Erased,
    abort,
    erase,
    erase_old,
    stored_keys,
    unfinished_uploads,
    upload_bytes,
    versions_of,
)
from salun_core.storage.s3 import S3Store, make_client

pytestmark = pytest.mark.s3
FUTURE = datetime(2200, 1, 1, tzinfo=UTC)


@pytest.fixture
def versioned(store):
    """A store whose bucket keeps versions; the session's bucket does not."""
    client, _, prefix = store.native
    bucket = f"versions-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key=f"{prefix}before", Body=b"written before versions were kept")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return S3Store(bucket, prefix, client=make_client())


@pytest.fixture
def unshared(store):
    """The store with a client of its own, to which a test may add event handlers."""
    client, bucket, prefix = make_client(), *store.native[1:]
    return S3Store(bucket, prefix, client=client)


def write(store, key, *bodies):
    client, bucket, prefix = store.native
    for body in bodies:
        client.put_object(Bucket=bucket, Key=prefix + key, Body=body)


def test_every_version_and_marker_of_exactly_one_key_is_erased(versioned):
    write(versioned, "a/x", b"1", b"22", b"333")
    versioned.delete("a/x")
    write(versioned, "a/x", b"4444")
    versioned.delete("a/x")
    write(versioned, "a/xy", b"other")
    write(versioned, "a/x/below", b"another")
    assert versioned.get("a/x") is None
    assert [(item.marker, item.latest) for item in versions_of(versioned, "a/x")][0] == (True, True)
    assert len(versions_of(versioned, "a/x")) == 6
    assert erase(versioned, "a/x") == Erased(keys=1, versions=6, bytes=10)
    assert versions_of(versioned, "a/x") == []
    assert erase(versioned, "a/x") == Erased()
    assert versioned.get("a/xy").data == b"other"
    assert versioned.get("a/x/below").data == b"another"


def test_a_version_older_than_versioning_is_erased(versioned):
    write(versioned, "before", b"newer")
    assert [item.version == "null" for item in versions_of(versioned, "before")] == [False, True]
    assert erase(versioned, "before").versions == 2
    assert versions_of(versioned, "before") == []
    assert versioned.get("before") is None


def test_erase_without_versions_is_a_plain_delete(store):
    write(store, "a/x", b"1", b"22")
    write(store, "a/xy", b"other")
    assert erase(store, "a/x") == Erased(keys=1, versions=1, bytes=2)
    assert store.get("a/x") is None
    assert erase(store, "a/x") == Erased()
    assert store.get("a/xy").data == b"other"


def test_a_store_without_version_listing_gets_a_plain_delete(unshared):
    def refuse(params, **_):
        raise ClientError({"Error": {"Code": "NotImplemented"}}, "ListObjectVersions")

    write(unshared, "a/x", b"1")
    unshared.native[0].meta.events.register("before-parameter-build.s3.ListObjectVersions", refuse)
    assert [item.key for item in stored_keys(unshared)] == ["a/x"]
    assert erase(unshared, "a/x") == Erased(1, 1, 1)
    assert unshared.get("a/x") is None


def test_a_refused_version_listing_is_an_error_and_nothing_is_erased(unshared):
    def refuse(params, **_):
        raise ClientError({"Error": {"Code": "AccessDenied"}}, "ListObjectVersions")

    write(unshared, "a/x", b"1")
    unshared.native[0].meta.events.register("before-parameter-build.s3.ListObjectVersions", refuse)
    with pytest.raises(StoreError, match="not allowed"):
        erase(unshared, "a/x")
    assert unshared.get("a/x").data == b"1"


def test_erase_old_keeps_what_was_replaced_since(versioned):
    write(versioned, "doc", b"first", b"second", b"third")
    write(versioned, "hidden", b"first")
    versioned.delete("hidden")
    (replaced,) = {item.replaced for item in stored_keys(versioned, "doc")}
    assert erase_old(versioned, "doc", replaced) == Erased()
    later = datetime.now(UTC) + timedelta(days=1)
    assert erase_old(versioned, "doc", later) == Erased(1, 2, 11)
    assert versioned.get("doc").data == b"third"
    assert erase_old(versioned, "hidden", later) == Erased(1, 2, 5)
    assert versions_of(versioned, "hidden") == []  # its delete marker too: the key may name a request


def test_erase_old_keeps_the_latest_version(versioned):
    write(versioned, "doc", b"secret", b"redacted")
    assert erase_old(versioned, "doc") == Erased(1, 1, 6)
    assert versioned.get("doc").data == b"redacted"
    assert erase_old(versioned, "doc") == Erased()


def test_hidden_keys_are_listed(versioned):
    write(versioned, "a/hidden", b"1")
    versioned.delete("a/hidden")
    write(versioned, "a-seen", b"1", b"22")
    found = {item.key: (item.size, item.live, item.old) for item in stored_keys(versioned)}
    assert found["a/hidden"] == (1, False, 1)
    assert found["a-seen"] == (3, True, 1)
    assert [item.key for item in stored_keys(versioned, "a/")] == ["a/hidden"]
    assert list(versioned.list("a/")) == []


def test_a_killed_erase_leaves_the_key_listed(versioned):
    write(versioned, "x", b"1", b"22", b"333")
    calls = []

    def killed(params, **_):
        calls.append(params)
        if len(calls) == 3:
            raise KeyboardInterrupt

    events = versioned.native[0].meta.events
    events.register("before-parameter-build.s3.DeleteObject", killed, unique_id="kill")
    with pytest.raises(KeyboardInterrupt):
        erase(versioned, "x")
    events.unregister("before-parameter-build.s3.DeleteObject", unique_id="kill")
    assert versioned.get("x").data == b"333"
    assert erase(versioned, "x").versions == 1


def test_unfinished_uploads_are_listed_and_aborted(store):
    client, bucket, prefix = store.native
    begun = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}blobs/x")["UploadId"]
    client.upload_part(Bucket=bucket, Key=f"{prefix}blobs/x", UploadId=begun, PartNumber=1, Body=b"weights")
    (found,) = unfinished_uploads(store, FUTURE)
    assert (found.key, found.id) == ("blobs/x", begun)
    assert upload_bytes(store, found) == 7
    assert unfinished_uploads(store, found.initiated - timedelta(hours=1)) == []
    assert unfinished_uploads(store, FUTURE, "runs/") == []
    assert abort(store, found).bytes == 7
    assert unfinished_uploads(store, FUTURE) == []
    assert abort(store, found).bytes == 0  # gone already: no error
