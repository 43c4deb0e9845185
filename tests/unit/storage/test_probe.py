import pytest

from salun_core.errors import StoreError
from salun_core.storage import open_store
from salun_core.storage.probe import probe, require_safe
from salun_core.storage.s3 import S3Store, make_client

pytestmark = pytest.mark.s3


def careless(store, *headers):
    """The same server as if it ignored some conditional headers: they are taken off before it sees them."""

    def strip(request, **_):
        for header in headers:
            del request.headers[header]  # no error where there is none

    client = make_client()
    client.meta.events.register("before-sign.s3.PutObject", strip)
    return S3Store("salun", store.uri.removeprefix("s3://salun/"), client=client)


def test_a_real_store_is_safe_and_left_clean(store):
    store.put_new("mine", b"kept")
    report = require_safe(store)
    assert report.safe
    assert report.uri == store.uri
    assert len(report.checks) == 6
    assert [entry.key for entry in store.list("")] == ["mine"]


@pytest.mark.parametrize(
    ("ignored", "broken"),
    [
        (["If-None-Match"], {"of racing creates one wins"}),
        (
            ["If-Match"],
            {"of racing swaps one wins", "a stale etag is refused", "a swap of a missing key is refused"},
        ),
    ],
)
def test_a_store_that_ignores_conditions_is_refused(store, ignored, broken, monkeypatch):
    unsafe = careless(store, *ignored)
    report = probe(unsafe)
    assert {check.name for check in report.checks if not check.passed} == broken
    monkeypatch.setattr("salun_core.storage.probe.probe", lambda _: report)  # another one would find the same
    with pytest.raises(StoreError) as caught:
        require_safe(unsafe)
    assert all(name in str(caught.value) for name in broken)
    assert "conditional writes" in caught.value.remedy
    assert list(store.list("")) == []


def test_a_store_that_refuses_every_condition_is_unsafe(store):
    def spoil(request, **_):
        del request.headers["If-None-Match"]
        del request.headers["If-Match"]
        request.headers["If-Match"] = '"00000000000000000000000000000000"'

    client = make_client()
    client.meta.events.register("before-sign.s3.PutObject", spoil)
    report = probe(S3Store("salun", store.uri.removeprefix("s3://salun/"), client=client))
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert failed["of racing creates one wins"] == "nobody won"
    assert "a fresh etag is accepted" in failed


def test_an_unreachable_store_is_an_error_not_a_report(s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="access key"):
        require_safe(open_store("s3://salun/x"))
