import itertools
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from types import SimpleNamespace
from urllib.parse import urlsplit

import boto3.session
import pytest
from botocore.awsrequest import AWSResponse, HeadersDict
from botocore.config import Config
from urllib3 import HTTPResponse

from salun_core.errors import ConflictError, IntegrityError, StoreError, StoreUnreachableError, UsageError
from salun_core.storage import open_store
from salun_core.storage.erase import stored_keys
from salun_core.storage.s3 import S3Store, make_client, shared_client
from salun_core.storage.s3_settings import VARIABLES
from tests.support.fault_proxy import LOST, FaultProxy

pytestmark = pytest.mark.s3


def answer(status, code):
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


BROKEN = answer(503, "SlowDown")
RACE = answer(409, "ConditionalRequestConflict")


def prefix_of(store):
    return store.uri.removeprefix("s3://salun/")


def upstream(store):
    parts = urlsplit(store.endpoint)
    return parts.hostname, parts.port


def impatient(endpoint):
    """A client that sends everything once."""
    config = Config(retries={"total_max_attempts": 1}, read_timeout=10)
    return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)


def test_written_objects_are_read_back(store):
    before = datetime.now(UTC)
    etag = store.put_new("a/b.json", b"{}")
    found = store.get("a/b.json")
    assert (found.data, found.etag) == (b"{}", etag)
    assert found.modified.tzinfo == UTC
    assert abs(found.modified - before) < timedelta(minutes=1)
    assert store.get("a/none.json") is None


def test_create_only(store):
    etag = store.put_new("doc", b"one")
    assert store.put_new("doc", b"one") == etag
    with pytest.raises(ConflictError, match="exists already"):
        store.put_new("doc", b"two")
    assert store.get("doc").data == b"one"


def test_compare_and_swap(store):
    first = store.put_new("doc", b"one")
    second = store.put_if("doc", b"two", first)
    with pytest.raises(ConflictError, match="another writer changed it"):
        store.put_if("doc", b"three", first)
    assert store.get("doc").data == b"two"
    store.delete("doc")
    with pytest.raises(ConflictError, match="deleted meanwhile"):
        store.put_if("doc", b"three", second)
    assert store.get("doc") is None


def test_deleting_twice_succeeds(store):
    store.put_new("doc", b"one")
    store.delete("doc")
    store.delete("doc")
    assert store.get("doc") is None


def test_racing_creates_have_one_winner(store):
    barrier = threading.Barrier(8)

    def create(number):
        barrier.wait()
        try:
            store.put_new("doc", b"%d" % number)
        except ConflictError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(create, range(8)) if number is not None]
    assert [b"%d" % number for number in winners] == [store.get("doc").data]


def test_listing_is_sorted_relative_and_whole(store):
    keys = ["z/a-b", "z/a/b", "z/a/c", "z/a.b", "z/ab", "z/a0", "z/B/x", "y"]
    for key in keys:
        store.put_new(key, key.encode())
    outside = open_store(f"{store.uri}x")
    outside.put_new("stranger", b"")

    def small_pages(params, **_):
        params["MaxKeys"] = 3

    client = make_client()
    client.meta.events.register("before-parameter-build.s3.ListObjectsV2", small_pages)
    paged = S3Store("salun", prefix_of(store), client=client)
    assert [entry.key for entry in paged.list("")] == sorted(keys)
    assert [entry.key for entry in paged.list("z/a")] == sorted(key for key in keys if key.startswith("z/a"))
    entry = next(iter(paged.list("y")))
    assert (entry.size, entry.etag) == (1, store.get("y").etag)
    assert list(paged.list("none")) == []


@pytest.mark.parametrize("key", ["", "../x", "a/../../x", "/a", "a//b", "a/", "a\x00"])
def test_no_key_leaves_the_prefix(store, key, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    calls = [
        lambda: store.get(key),
        lambda: store.put_new(key, b""),
        lambda: store.put_if(key, b"", '"x"'),
        lambda: store.delete(key),
        lambda: store.upload(file, key),
        lambda: store.download(key, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    with pytest.raises(UsageError):
        list(store.list("../"))


def test_the_start_of_an_object_is_read(store):
    store.put_new("long", b"0123456789")
    store.put_new("empty", b"")
    assert [store.read_start("long", size) for size in (1, 4, 10, 99)] == [b"0", b"0123", b"0123456789", b"0123456789"]
    assert store.read_start("empty", 4) == b""
    assert store.read_start("none", 4) is None


def test_ranges_are_of_one_state_of_an_object(store):
    etag = store.put_new("long", b"0123456789")
    assert [store.read_range("long", *span, etag) for span in ((0, 3), (4, 2), (8, 99))] == [b"012", b"45", b"89"]
    assert store.read_range("none", 0, 1, etag) is None
    store.put_if("long", b"0123", etag)
    assert store.read_range("long", 0, 3, etag) is None
    assert store.read_range("long", 8, 1, etag) is None  # behind its end


@pytest.mark.parametrize("size", [0, 1, 40 * 1024 * 1024 + 17], ids=["empty", "byte", "parts"])
def test_files_are_uploaded_and_downloaded_complete(store, tmp_path, size):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    store.upload(source, "files/x")
    store.download("files/x", target)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_missing_file_or_key_is_reported(store, tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        store.upload(tmp_path / "none", "x")
    with pytest.raises(StoreError, match="the object or the bucket does not exist"):
        store.download("none", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_the_old_file(store, tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(StoreError):
        store.download("none", target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_full_disk_leaves_nothing(store, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.write_bytes(os.urandom(3 << 20))
    folder.mkdir()
    store.upload(source, "files/x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreError, match="free some space"):
            store.download("files/x", folder / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []


def test_a_cut_download_leaves_nothing(store, tmp_path):
    store.put_new("files/x", os.urandom(3 << 20))
    cut = b'HTTP/1.1 200 OK\r\nContent-Length: 3145728\r\nETag: "x"\r\n\r\n' + b"\x00" * 100_000
    faults = {"GET": cut}
    with FaultProxy(upstream(store), lambda line: faults.get(line.split()[0])) as proxy:
        broken = S3Store("salun", prefix_of(store), client=impatient(proxy.endpoint))
        with pytest.raises(StoreError):
            broken.download("files/x", tmp_path / "out")
        assert proxy.faults >= 2
    assert list(tmp_path.iterdir()) == []


def test_a_cut_document_is_read_again(store):
    store.put_new("doc", b"x" * 100)
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: x\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\nxx"
    replies = iter([cut, cut])
    with FaultProxy(upstream(store), lambda line: next(replies, None)) as proxy:
        found = S3Store("salun", prefix_of(store), proxy.endpoint).get("doc")
    whole = store.get("doc")
    assert (found.data, found.etag, found.modified) == (b"x" * 100, whole.etag, whole.modified)  # `served` is a clock


CUT = {
    "name": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "status": b"HTTP/1.1 200 O",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: ",
    "date": b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "x"\r\nLast-Modified: Thu, 0',
    "rest": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
    "etag": b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "5d41',
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nDate: now\r\n\r\n",
}
HELLO = '"5d41402abc4b2a76b9719d911017c592"'  # the etag of b"hello"
READS = {
    "get": lambda store, _: store.get("docs/a").data == b"hello",
    "start": lambda store, _: store.read_start("docs/a", 2) == b"he",
    "range": lambda store, _: store.read_range("docs/a", 1, 3, HELLO) == b"ell",
    "list": lambda store, _: [entry.key for entry in store.list("docs/")] == ["docs/a"],
    "versions": lambda store, _: [item.key for item in stored_keys(store, "docs/")] == ["docs/a"],
    "download": lambda store, path: store.download("docs/a", path) or path.read_bytes() == b"hello",
    "copy": lambda store, _: store.copy("docs/a", "other") and store.get("other").data == b"hello",
}


ONCE = {
    *((act, "name") for act in READS),
    *(("range", cut) for cut in ("etag", "rest", "empty")),
    *(("versions", cut) for cut in CUT if cut != "empty"),
}


@pytest.mark.parametrize(("act", "cut"), sorted(ONCE))
def test_an_answer_that_breaks_off_is_asked_for_again(act, cut, store, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store.put_new("docs/a", b"hello")
    replies = iter([CUT[cut]])
    with FaultProxy(upstream(store), lambda line: next(replies, None)) as proxy:
        assert READS[act](S3Store("salun", prefix_of(store), proxy.endpoint), tmp_path / "out")
        assert proxy.faults == 1


@pytest.mark.parametrize("cut", ["empty", "name"])
@pytest.mark.parametrize("act", ["get", "list", "versions"])
def test_answers_that_always_break_off_are_no_empty_result(act, cut, store, tmp_path, monkeypatch):
    """A purge that took a cut listing for an empty one would delete all that it does not see."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store.put_new("docs/a", b"hello")
    with FaultProxy(upstream(store), lambda line: CUT[cut]) as proxy, pytest.raises(StoreUnreachableError):
        READS[act](S3Store("salun", prefix_of(store), proxy.endpoint), tmp_path / "out")


@pytest.mark.parametrize("cut", ["date", "empty", "name"])
def test_a_write_whose_answer_breaks_off_is_read_back(cut, store, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    replies = iter([CUT[cut]])
    with FaultProxy(upstream(store), lambda line: next(replies, None)) as proxy:
        etag = S3Store("salun", prefix_of(store), proxy.endpoint).put_new("doc", b"one")
    assert etag == store.get("doc").etag


def test_a_huge_document_is_refused_before_it_is_read(store):
    store.put_new("doc", b"x")
    huge = b'HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\nETag: "x"\r\n\r\n'
    with FaultProxy(upstream(store), lambda line: huge) as proxy, pytest.raises(IntegrityError, match="too large"):
        S3Store("salun", prefix_of(store), proxy.endpoint).get("doc")


def test_a_hundred_lost_replies_cause_no_conflicts(store):
    """Each document is created and then swapped; the first reply to each of the two is lost."""
    pending = set()

    def lose_once(line):
        method, path, _ = line.split()
        if method == "PUT" and path in pending:
            pending.remove(path)
            return LOST
        return None

    with FaultProxy(upstream(store), lose_once) as proxy:
        through = S3Store("salun", prefix_of(store), proxy.endpoint)

        def create_and_swap(number):
            key = f"docs/{number:03d}"
            pending.add(f"/salun/{prefix_of(store)}/{key}")
            etag = through.put_new(key, b"created %d" % number)
            pending.add(f"/salun/{prefix_of(store)}/{key}")
            return through.put_if(key, b"swapped %d" % number, etag)

        with ThreadPoolExecutor(16) as pool:
            etags = list(pool.map(create_and_swap, range(50)))
        assert proxy.faults == 100
    assert [entry.etag for entry in store.list("docs/")] == etags
    assert [store.get(f"docs/{n:03d}").data for n in range(50)] == [b"swapped %d" % n for n in range(50)]


@pytest.mark.parametrize("reply", [LOST, BROKEN], ids=["lost", "503"])
def test_a_write_whose_every_reply_is_lost_is_read_back(store, reply):
    with FaultProxy(upstream(store), lambda line: reply if line.startswith("PUT") else None) as proxy:
        through = S3Store("salun", prefix_of(store), client=impatient(proxy.endpoint))
        etag = through.put_if("doc", b"two", through.put_new("doc", b"one"))
        assert proxy.faults == 2
    assert store.get("doc").etag == etag
    assert store.get("doc").data == b"two"


def test_a_lost_reply_does_not_hide_a_real_conflict(store):
    etag = store.put_new("doc", b"theirs")
    store.put_if("doc", b"theirs again", etag)
    lose = itertools.cycle([LOST, None])
    with FaultProxy(upstream(store), lambda line: next(lose) if line.startswith("PUT") else None) as proxy:
        through = S3Store("salun", prefix_of(store), proxy.endpoint)
        with pytest.raises(ConflictError):
            through.put_new("doc", b"ours")
        with pytest.raises(ConflictError):
            through.put_if("doc", b"ours", etag)
        assert proxy.faults == 2
    assert store.get("doc").data == b"theirs again"


def test_without_any_reply_the_error_is_the_stores(store):
    with FaultProxy(upstream(store), lambda line: LOST) as proxy:
        through = S3Store("salun", prefix_of(store), client=impatient(proxy.endpoint))
        with pytest.raises(StoreError, match="no answer from"):
            through.put_new("doc", b"one")


def test_an_upload_with_a_lost_last_reply_is_complete(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 << 20))
    lose = itertools.chain([LOST], itertools.repeat(None))

    def lose_completion(line):
        return next(lose) if line.startswith("POST") and "uploadId=" in line else None

    with FaultProxy(upstream(store), lose_completion) as proxy:
        S3Store("salun", prefix_of(store), proxy.endpoint).upload(source, "files/x")
        assert proxy.faults == 1
    store.download("files/x", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_an_upload_that_was_closed_unfinished_is_an_error(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 << 20))
    closed = answer(404, "NoSuchUpload")
    with FaultProxy(upstream(store), lambda line: closed if "partNumber=1" in line else None) as proxy:
        through = S3Store("salun", prefix_of(store), proxy.endpoint)
        with pytest.raises(StoreError, match="NoSuchUpload"):
            through.upload(source, "files/x")
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (403, "AccessDenied", "not allowed to do that"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (400, "ExpiredToken", "have expired"),
        (503, "SlowDown", "busy or broken"),
        (500, "InternalError", "busy or broken"),
        (418, "Teapot", "refused it (418 Teapot)"),
    ],
)
def test_every_refusal_has_its_reason(store, status, code, why):
    with FaultProxy(upstream(store), lambda line: answer(status, code)) as proxy:
        through = S3Store("salun", prefix_of(store), client=impatient(proxy.endpoint))
        for call in (lambda: through.get("doc"), lambda: list(through.list("")), lambda: through.delete("doc")):
            with pytest.raises(StoreError) as caught:
                call()
            assert why in str(caught.value)
            assert caught.value.remedy


def test_bytes_that_do_not_match_the_stores_checksum_are_refused(store):
    wrong = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: x\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        b"x-amz-checksum-sha256: a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s=\r\nConnection: close\r\n\r\nxx"
    )
    with FaultProxy(upstream(store), lambda line: wrong) as proxy, pytest.raises(IntegrityError, match="checksum"):
        S3Store("salun", prefix_of(store), proxy.endpoint).get("doc")


def test_a_write_that_never_arrived_is_not_a_conflict(store):
    etag = store.put_new("doc", b"theirs")

    def swallow(request, **_):
        return AWSResponse(request.url, 503, HeadersDict(), HTTPResponse(BytesIO(), preload_content=False))

    client = impatient(store.endpoint)
    client.meta.events.register("before-send.s3.PutObject", swallow)
    through = S3Store("salun", prefix_of(store), client=client)
    for write in (lambda: through.put_new("new", b"x"), lambda: through.put_if("doc", b"x", etag)):
        with pytest.raises(StoreError, match="busy or broken"):
            write()
    assert store.get("doc").data == b"theirs"


def test_a_409_is_retried(store):
    replies = iter([RACE, RACE])
    with FaultProxy(upstream(store), lambda line: next(replies, None) if line.startswith("PUT") else None) as proxy:
        etag = S3Store("salun", prefix_of(store), proxy.endpoint).put_new("doc", b"one")
        assert proxy.faults == 2
    assert store.get("doc").etag == etag


def test_endless_409_is_given_up(store, monkeypatch):
    waits = []
    monkeypatch.setattr("salun_core.storage.s3.time", SimpleNamespace(sleep=waits.append))
    with FaultProxy(upstream(store), lambda line: RACE if line.startswith("PUT") else None) as proxy:
        with pytest.raises(StoreError, match="409"):
            S3Store("salun", prefix_of(store), proxy.endpoint).put_if("doc", b"one", '"x"')
        assert 2 <= proxy.faults <= 10
    assert len(waits) == proxy.faults
    assert 3 < sum(waits) < 10


def every_call(store, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    return [
        lambda: store.get("a"),
        lambda: store.put_new("a", b""),
        lambda: store.put_if("a", b"", '"x"'),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
        lambda: store.upload(file, "a"),
        lambda: store.download("a", tmp_path / "out"),
    ]


def assert_refused(store, tmp_path, why, remedy):
    for call in every_call(store, tmp_path):
        with pytest.raises(StoreError) as caught:
            call()
        text = str(caught.value)
        assert why in text
        assert remedy in text
        assert "\n" not in text
        assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret") not in text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_secret_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-of-mine")
    other = open_store(store.uri)
    calls = every_call(other, tmp_path)[:6]
    for call in calls:
        with pytest.raises(StoreError, match="secret key does not fit") as caught:
            call()
        assert "AWS_SECRET_ACCESS_KEY" in caught.value.remedy
        assert "sesame-of-mine" not in str(caught.value)
    with pytest.raises(StoreError, match="credentials"):  # HEAD answers carry no reason
        other.download("a", tmp_path / "out")


def test_an_unknown_account_is_refused(store, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="does not know the access key"):
        open_store(store.uri).get("a")


def test_missing_credentials_are_named(store, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_refused(open_store(store.uri), tmp_path, "no credentials", "set AWS_ACCESS_KEY_ID")


def test_incomplete_credentials_are_named(store, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="credentials"):
        open_store(store.uri).get("a")


def as_own(monkeypatch, *names):
    """Give settings of the server under our own names, and another account's under those of AWS."""
    other = {"ENDPOINT_URL": "http://127.0.0.1:9", "REGION": "eu-west-1", "SESSION_TOKEN": "of-another"}
    for name in names:
        monkeypatch.setenv(f"SALUN_S3_{name}", os.environ[f"AWS_{name}"])
        monkeypatch.setenv(f"AWS_{name}", other.get(name, "of-another"))
        monkeypatch.delenv(f"AWS_{name}_S3", raising=False)


def test_our_own_variables_win_over_those_of_aws(store, monkeypatch):
    store.put_new("a", b"one")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another")  # must not be sent with our own keys
    as_own(monkeypatch, "ENDPOINT_URL", "REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    assert open_store(store.uri).get("a").data == b"one"
    assert make_client().meta.region_name == "us-east-1"
    assert make_client("http://127.0.0.1:8").meta.endpoint_url == "http://127.0.0.1:8"


@pytest.mark.parametrize("names", [["ENDPOINT_URL"], ["REGION"], ["ACCESS_KEY_ID", "SECRET_ACCESS_KEY"]])
def test_each_of_our_own_variables_replaces_its_counterpart_only(store, monkeypatch, names):
    store.put_new("a", b"one")
    as_own(monkeypatch, *names)
    assert open_store(store.uri).get("a").data == b"one"


def test_empty_variables_of_our_own_count_as_not_set(store, monkeypatch):
    store.put_new("a", b"one")
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert open_store(store.uri).get("a").data == b"one"


@pytest.mark.parametrize("given", ["ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"])
def test_half_a_pair_of_our_own_keys_is_refused(store, monkeypatch, given):
    """It must not be completed with half of another account's."""
    monkeypatch.setenv(f"SALUN_S3_{given}", "sesame-of-mine")
    with pytest.raises(StoreError, match=f"SALUN_S3_{given} is set, but") as caught:
        open_store(store.uri)
    for name in ("SALUN_S3_ACCESS_KEY_ID", "SALUN_S3_SECRET_ACCESS_KEY"):
        assert name in caught.value.remedy
    assert "sesame-of-mine" not in str(caught.value)


def test_errors_name_the_variables_in_use(store, tmp_path, monkeypatch):
    as_own(monkeypatch, "ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
    monkeypatch.setenv("SALUN_S3_SECRET_ACCESS_KEY", "sesame-of-mine")
    with pytest.raises(StoreError, match="check SALUN_S3_ACCESS_KEY_ID and SALUN_S3_SECRET_ACCESS_KEY"):
        open_store(store.uri).get("a")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"SALUN_S3_{name}")
        monkeypatch.delenv(f"AWS_{name}")
    # A pod without its Secret: the address has our name, so the keys should have it, too.
    assert_refused(open_store(store.uri), tmp_path, "no credentials", "set SALUN_S3_ACCESS_KEY_ID and SALUN_S3_SECRET")
    monkeypatch.setenv("SALUN_S3_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(StoreError, match="set SALUN_S3_ENDPOINT_URL to http"):
        open_store(store.uri)


def test_a_store_that_is_down_is_named(store, tmp_path):
    down = S3Store("salun", client=impatient("http://127.0.0.1:9"))
    assert_refused(down, tmp_path, "no answer from http://127.0.0.1:9", "AWS_ENDPOINT_URL")


def test_an_endpoint_that_is_not_a_url_is_named(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9000")
    with pytest.raises(StoreError, match="http://host:port"):
        open_store("s3://salun")


def test_a_missing_bucket_is_named(s3_server, tmp_path):
    lost = open_store("s3://no-such-bucket/x")
    for call in every_call(lost, tmp_path)[:6]:
        with pytest.raises(StoreError, match="bucket does not exist"):
            call()
    with pytest.raises(StoreError, match="bucket does not exist"):
        lost.download("a", tmp_path / "out")


def test_a_client_keeps_its_own_credentials(store, monkeypatch):
    """Two stores of one process may have different accounts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    other = open_store(store.uri)
    with pytest.raises(StoreError):
        other.get("a")
    assert store.get("a") is None


def test_stores_with_the_same_settings_share_a_client(store, monkeypatch):
    client = open_store(store.uri).native[0]
    with ThreadPoolExecutor(8) as pool:
        assert {id(found) for found in pool.map(lambda _: open_store("s3://other/x").native[0], range(32))} == {
            id(client)
        }
    monkeypatch.setenv("SALUN_RUN_ID", "run-1")  # not a setting of the client
    assert shared_client() is client


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_SECRET_ACCESS_KEY", "another"),
        ("SALUN_S3_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("SALUN_S3_REGION", "eu-west-1"),
        ("HTTPS_PROXY", "http://127.0.0.1:9"),
    ],
)
def test_other_settings_give_another_client(store, monkeypatch, name, value):
    before = shared_client()
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        assert shared_client() is not before
    assert shared_client() is before


def test_a_changed_credentials_file_gives_another_client(store, monkeypatch, tmp_path):
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    before = shared_client()
    path.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    assert shared_client() is not before


def test_a_forked_process_builds_its_own_client(store):
    before, (read, write) = shared_client(), os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, b"other" if shared_client() is not before else b"same")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 9) == b"other"
