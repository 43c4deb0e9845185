"""The server in memory answers as the real one does."""

import secrets
from datetime import UTC, datetime

import pytest
from botocore.exceptions import ClientError

from salun_core.errors import ConflictError, StoreError
from salun_core.storage.erase import abort, erase, stored_keys, unfinished_uploads, upload_bytes, versions_of
from salun_core.storage.s3 import S3Store, make_client
from tests.support.memory_s3 import MemoryS3

FUTURE = datetime(2200, 1, 1, tzinfo=UTC)


def refused(call, *args, **kwargs):
    """What a call ends with: its result, or the error without what names the place."""
    try:
        return call(*args, **kwargs)
    except (ConflictError, StoreError) as error:
        return type(error).__name__, error.why
    except ClientError as error:
        return error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]


def documents(store, tmp_path):
    yield refused(store.get, "a")
    first = store.put_new("a", b"one")
    yield first == store.put_new("a", b"one")
    yield refused(store.put_new, "a", b"two")
    yield refused(store.put_if, "b", b"two", first)
    second = store.put_if("a", b"two", first)
    yield refused(store.put_if, "a", b"three", first)
    found = store.get("a")
    yield found.data, found.etag == second, found.served is not None, found.modified.microsecond
    yield abs((found.served - datetime.now(UTC)).total_seconds()) < 60
    store.put_new("a-b", b"1")
    store.put_new("b/c", b"22")
    yield [(item.key, item.size, item.etag == second) for item in store.list("")]
    yield [item.key for item in store.list("b/")]
    yield store.read_start("a", 2), store.read_start("a", 99), store.read_start("none", 2)
    yield store.read_range("a", 1, 1, second), store.read_range("a", 5, 1, second), store.read_range("a", 1, 1, first)
    store.delete("a")
    store.delete("a")
    yield store.get("a"), [item.key for item in store.list("a")]
    yield store.put_new("a", b"again") == first
    path, sizes = tmp_path / secrets.token_hex(4), []
    path.write_bytes(b"file")
    store.upload(path, "f")
    store.upload(path, "f")
    store.download("f", path, sizes.append)
    yield path.read_bytes(), sum(sizes), refused(store.download, "none", path)
    yield store.copy("f", "g"), store.copy("none", "h"), store.get("g").data, store.get("h")
    client, bucket, prefix = store.native
    yield refused(client.head_object, Bucket=bucket, Key=f"{prefix}none")
    yield refused(S3Store("no-such-bucket", client=client).get, "a")


def versions(store, tmp_path):
    def rows(key):
        found = [(item.latest, item.marker, item.size, item.version == "null") for item in versions_of(store, key)]
        return sorted(found, reverse=True)  # all are of one second

    client, bucket, prefix = store.native
    for body in (b"1", b"22"):
        client.put_object(Bucket=bucket, Key=f"{prefix}a", Body=body)
    store.delete("a")
    store.put_new("a", b"333")
    store.put_new("ab", b"4")
    yield rows("a")
    newest, *older = versions_of(store, "a")
    client.delete_object(Bucket=bucket, Key=f"{prefix}a", VersionId=newest.version)
    yield store.get("a"), rows("a")
    for marker in (item for item in older if item.marker):
        client.delete_object(Bucket=bucket, Key=f"{prefix}a", VersionId=marker.version)
        yield store.get("a").data, rows("a")
    store.delete("ab")
    yield [(item.key, item.size, item.live, item.old) for item in stored_keys(store)]
    yield erase(store, "a"), erase(store, "a"), rows("a")
    made = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}u")
    part = {"Bucket": bucket, "Key": f"{prefix}u", "UploadId": made["UploadId"], "PartNumber": 1}
    client.upload_part(**part, Body=b"part")
    (upload,) = unfinished_uploads(store, FUTURE)
    yield upload.key, upload_bytes(store, upload), [item.key for item in store.list("u")]
    yield abort(store, upload), unfinished_uploads(store, FUTURE)


@pytest.mark.parametrize("script", [documents, versions])
@pytest.mark.parametrize("keeps_versions", [False, True])
def test_it_answers_as_the_real_server_does(s3_server, tmp_path, script, keeps_versions):
    answers = []
    for client in (make_client(), MemoryS3().client()):
        bucket = f"memory-{secrets.token_hex(4)}"
        client.create_bucket(Bucket=bucket)
        if keeps_versions:
            client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        answers.append(list(script(S3Store(bucket, "of/this", client=client), tmp_path)))
    real, memory = answers
    assert memory == real


def test_handlers_see_each_request_before_it_is_done():
    client, seen = MemoryS3("salun").client(), []
    client.meta.events.register("before-call.s3", lambda model, params, **_: seen.append((model.name, params)))
    client.put_object(Bucket="salun", Key="p/a", Body=b"x")
    store = S3Store("salun", "p", client=client)
    list(store.list("a"))
    assert [(name, params["url_path"]) for name, params in seen] == [
        ("PutObject", "/salun/p/a"),
        ("ListObjectsV2", "/salun/"),
    ]
    assert seen[1][1]["query_string"] == {"prefix": "p/a"}
