import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salun_core.errors import IntegrityError, UsageError
from salun_core.storage import keys as names
from salun_core.storage import open_store, split_uri

DIGEST = "a" * 64
TRAVERSALS = ["..", ".", "", "../x", "a/b", "/etc/passwd", "a\\b", "a\x00b", "a\n", "-a", ".hidden", "a" * 200, "ä"]


@pytest.mark.parametrize("text", TRAVERSALS)
@pytest.mark.parametrize(
    "build",
    [
        names.head_key,
        names.lease_key,
        names.versions_prefix,
        names.request_key,
        names.events_prefix,
        names.certificate_key,
        names.scratch_prefix,
        names.check_file_name,
        lambda text: names.version_key(text, DIGEST),
        lambda text: names.run_key(text, "mask.safetensors"),
        lambda text: names.run_key("run-1", text),
        lambda text: names.event_key(text, 1),
    ],
)
def test_no_key_is_built_from_unsafe_text(build, text):
    with pytest.raises(UsageError):
        build(text)


SCRATCH = ["forget.json", "mask/0123abcd/mask.safetensors", "model/0123abcd/unet/config.json", "forget/ab/forget.json"]


@pytest.mark.parametrize("text", SCRATCH)
def test_a_file_of_a_run_lies_in_folders_of_its_own(text):
    assert names.scratch_key("run-1", text) == f"scratch/run-1/{text}"
    assert names.kind_of_key(f"scratch/run-1/{text}") == ("scratch", {"run": "run-1", "path": text})


@pytest.mark.parametrize(
    "text",
    [
        *(text for text in TRAVERSALS if text != "a/b"),
        *("mask/../forget.json", "../run-2/forget.json", "mask//x", "/mask", "mask/", "mask/.x/y", "a/b/c/d/e/f/g"),
    ],
)
def test_no_file_of_a_run_leaves_its_folder(text):
    with pytest.raises(UsageError):
        names.scratch_key("run-1", text)


RELATIVE = ["model.json", "unet/config.json", "a/b/c/d", "A9/b-_.c", "/".join(["x" * 49] * 4)]


@pytest.mark.parametrize("text", RELATIVE)
def test_a_file_of_a_version_may_lie_in_folders(text):
    assert names.check_relative_name(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *(text for text in TRAVERSALS if text != "a/b"),
        *("a/../b", "a/./b", "../a", "a/..", "a//b", "/a", "a/", "a/.b", ".a/b", "a/-b", "a/b\\c", "a/b\n", "a/é"),
        *("a/b/c/d/e", "a/" + "b" * 129, "/".join(["x" * 50] * 4)),
    ],
)
def test_names_outside_the_folder_are_refused(text):
    with pytest.raises(UsageError, match="neither a plain file name nor one in a plain folder"):
        names.check_relative_name(text)


_SEGMENT = st.sampled_from(
    ["a", "b", "unet", "..", ".", "", ".git", "x" * 128, "x" * 129, "c\\d", "e\x00", "ü", "CON", "~"]
)


@given(st.text(max_size=12) | st.lists(_SEGMENT, max_size=6).map("/".join))
def test_an_accepted_name_stays_below_its_folder(text):
    try:
        names.check_relative_name(text)
    except UsageError:
        return
    root = Path("/folder")
    path = root / text
    assert path.relative_to(root).as_posix() == text
    assert (root / text).resolve() == path
    assert 1 <= len(path.relative_to(root).parts) <= 4
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", part) for part in text.split("/"))
    assert len(text) <= 200


@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), max_size=6))
def test_accepted_names_can_lie_in_one_folder(found):
    """The file system is the judge."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in sorted(found, key=len, reverse=True):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(b"")
            possible = True
        except OSError:
            possible = False
    try:
        names.check_tree(found)
        accepted = True
    except UsageError:
        accepted = False
    assert accepted is possible


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61, "g" * 64])
def test_no_key_is_built_from_an_invalid_digest(digest):
    with pytest.raises(IntegrityError):
        names.blob_key(digest)
    with pytest.raises(IntegrityError):
        names.version_key("line", digest)


def test_keys_have_the_published_layout():
    assert names.head_key("mnist") == "lines/mnist/HEAD.json"
    assert names.version_key("mnist", DIGEST) == f"lines/mnist/versions/{DIGEST}/manifest.json"
    assert names.blob_key(DIGEST) == f"blobs/sha256/{DIGEST}"
    assert names.request_key("r1") == "requests/r1/request.json"
    assert names.event_key("r1", 7) == "requests/r1/events/000007.json"
    assert names.run_key("run", "mask.safetensors") == "runs/run/mask.safetensors"
    assert names.certificate_key("r1") == "certificates/r1.json"
    assert names.lease_key("mnist") == "leases/mnist.json"
    assert names.scratch_key("run", "ids.json") == "scratch/run/ids.json"


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_event_numbers_out_of_range_are_refused(number):
    with pytest.raises(UsageError):
        names.event_key("r1", number)


@given(st.text())
def test_an_accepted_id_is_a_plain_segment(text):
    try:
        names.check_id("model line", text)
    except UsageError as error:
        suggested = re.search(r"did you mean '([^']*)'", error.remedy)
        if suggested:
            assert names.check_id("model line", suggested[1]) == suggested[1]
    else:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", text)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b\\c", "d\x7f", "é"]), max_size=5))
def test_an_accepted_key_has_no_empty_or_dot_segments(segments):
    key = "/".join(segments)
    unsafe = not segments or any(segment in {"..", ".", "", "b\\c", "d\x7f"} for segment in segments)
    if unsafe:
        with pytest.raises(UsageError):
            names.check_key(key)
    else:
        assert names.check_key(key) == key


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket/a/b/", ("bucket", "a/b")),
        ("s3://my.bucket-1/forget.json", ("my.bucket-1", "forget.json")),
    ],
)
def test_split_uri(uri, expected):
    assert split_uri(uri) == expected


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("bucket/a", "did you mean 's3://bucket/a'"),
        ("S3://Bucket/a", "did you mean 's3://bucket/a'"),
        ("s3:/bucket/a", "s3://"),
        ("http://minio:9000/bucket", "AWS_ENDPOINT_URL"),
        ("gs://bucket/a", "only S3"),
        ("s3://", "s3://bucket/prefix"),
        ("", "s3://bucket/prefix"),
        ("s3://bucket/../other", "plain/segments"),
        ("s3://bucket//a", "plain/segments"),
    ],
)
def test_a_wrong_address_suggests_a_valid_one(uri, remedy):
    with pytest.raises(UsageError) as caught:
        open_store(uri)
    assert remedy in caught.value.remedy


def test_a_password_in_an_address_is_not_repeated():
    with pytest.raises(UsageError) as caught:
        split_uri("http://user:hunter2@host/bucket")
    assert "hunter2" not in str(caught.value)


def test_every_built_key_is_recognised():
    digest = DIGEST
    built = [
        names.head_key("l"),
        names.version_key("l", digest),
        names.version_disposal_key("l", digest),
        names.version_rollback_key("l", digest),
        names.version_hold_key("l", digest),
        names.blob_key(digest),
        names.request_key("r"),
        names.event_key("r", 1),
        names.run_key("r", "run.json"),
        names.run_key("r", "evidence.json"),
        names.run_key("r", "report.html"),
        names.run_key("r", "outcome.json"),
        names.run_event_key("r", 1),
        names.certificate_key("r"),
        names.addendum_key("r", "disposal-1.json"),
        names.lease_key("l"),
        names.scratch_key("r", "forget.json"),
        names.index_key("queued", "l", 1, 1, "r"),
        names.work_key(digest),
    ]
    assert "unknown" not in {names.kind_of_key(key)[0] for key in built}
    assert len({names.kind_of_key(key)[0] for key in built}) == len(built) - 1  # evidence is a record like run.json
    assert {*names.LAYOUT, *names.RUN_FILES} >= {names.kind_of_key(key)[0] for key in built}
