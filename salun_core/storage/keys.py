"""Names that may become part of a path, and every key of the store built from them.

Nothing else in the package joins text into a key: an id is checked here first, so that no user text can
leave its folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from salun_core.digest import is_digest
from salun_core.errors import IntegrityError, UsageError

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_MAX_KEY_BYTES = 1024
_MAX_NAME = 200
MAX_SEGMENTS = 4
"""Of the name of a file in a version: itself and three folders."""
_SCHEME = "s3://"


def check_id(kind: str, text: str) -> str:
    """Return an id unchanged if it is safe in a key.

    Args:
        kind: what it names, such as "model line".
        text: 1 to 63 of `a-z 0-9 . _ -`, the first a letter or digit.

    Raises:
        UsageError: it is anything else; the remedy names the nearest valid id.
    """
    if _ID.fullmatch(text):
        return text
    near = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:63]
    hint = f"did you mean {near!r}? " if near else ""
    raise UsageError(
        f"{kind} {text[:80]!r} is not a valid id",
        "ids are 1 to 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit",
        f"{hint}choose a name of that form",
    )


def check_file_name(text: str) -> str:
    """Return a file name unchanged if it is plain: no folder, no leading dot, at most 128 characters.

    Raises:
        UsageError: it is anything else.
    """
    if _FILE.fullmatch(text):
        return text
    raise UsageError(
        f"{text[:80]!r} is not a plain file name",
        "it has letters, digits, '.', '_' and '-' only",
        "rename the file and leave folders out",
    )


def check_relative_name(text: str) -> str:
    """Return the name of a file in a folder of files unchanged if it can name no place outside.

    Args:
        text: 1 to 4 plain file names joined by `/`, at most 200 characters, such as `unet/config.json`.

    Raises:
        UsageError: it is anything else.
    """
    segments = text.split("/")
    if len(text) <= _MAX_NAME and len(segments) <= MAX_SEGMENTS and all(map(_FILE.fullmatch, segments)):
        return text
    raise UsageError(
        f"{text[:80]!r} is neither a plain file name nor one in a plain folder",
        f"at most {MAX_SEGMENTS} names joined by '/', of letters, digits, '.', '_' and '-', none begun with '.'",
        "rename the file or its folder",
    )


def check_tree(names: Collection[str]) -> None:
    """Check that files of these names can lie in one folder.

    Args:
        names: valid relative names.

    Raises:
        UsageError: a name is also the folder of another one.
    """
    parts = (name.split("/") for name in names)
    folders = {"/".join(part[:end]) for part in parts for end in range(1, len(part))}
    both = sorted(folders.intersection(names))
    if both:
        raise UsageError(f"{both[0]!r} is a file and a folder at once", "a name is one of the two", "rename the file")


def check_key(text: str) -> str:
    """Return a key unchanged if it has no empty, `.` or `..` segment and no control character.

    Raises:
        UsageError: it is empty, longer than 1,024 bytes, or names another place than it seems to.
    """
    segments = text.split("/")
    fits = 0 < len(text.encode(errors="replace")) <= _MAX_KEY_BYTES
    if fits and not _CONTROL.search(text) and not any(segment in {"", ".", ".."} for segment in segments):
        return text
    raise UsageError(
        f"{text[:80]!r} is not a valid key",
        "it is empty, too long, or has an empty, '.' or '..' segment or a control character",
        "write it as plain/segments/of/text",
    )


def _digest(text: str) -> str:
    if not is_digest(text):
        raise IntegrityError(
            f"{text[:80]!r} is not a digest", "a digest is 64 lower-case hex digits", "pass the whole SHA-256"
        )
    return text


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key; the key may be empty and has no trailing slash.

    Raises:
        UsageError: it is no such address; the remedy says the nearest right form.
    """
    bucket, _, key = uri[len(_SCHEME) :].partition("/")
    key = key.rstrip("/")
    if not uri.startswith(_SCHEME) or not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{_without_secrets(uri)!r} is not the address of a store",
            "it has the form s3://bucket/prefix",
            _nearest_uri(uri),
        )
    return bucket, check_key(key) if key else ""


def _without_secrets(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", uri)[:120]


def _nearest_uri(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme.lower() in {"http", "https"}:
        return "put the endpoint into AWS_ENDPOINT_URL and write s3://bucket/prefix"
    if separator and scheme.lower() not in {"s3", "s3a", "s3n", "minio"}:
        return "only S3 stores are supported; write s3://bucket/prefix"
    head, _, tail = (rest if separator else uri).strip("/").partition("/")
    bucket = re.sub(r"[^a-z0-9.-]+", "-", head.lower()).strip(".-")
    if not _BUCKET.fullmatch(bucket):
        return "write s3://bucket/prefix, the bucket's name of 3 to 63 lower-case letters, digits, '.' and '-'"
    return f"did you mean {_SCHEME + bucket + ('/' + tail if tail else '')!r}?"


def line_prefix(line: str) -> str:
    """Return the folder of a model line."""
    return f"lines/{check_id('model line', line)}/"


def head_key(line: str) -> str:
    """Return the key of a model line's HEAD."""
    return f"{line_prefix(line)}HEAD.json"


def versions_prefix(line: str) -> str:
    """Return the folder of a model line's versions."""
    return f"{line_prefix(line)}versions/"


def version_key(line: str, digest: str) -> str:
    """Return the key of a model version's manifest."""
    return f"{versions_prefix(line)}{_digest(digest)}/manifest.json"


def blob_key(digest: str) -> str:
    """Return the key of a content-addressed blob."""
    return f"blobs/sha256/{_digest(digest)}"


def requests_prefix() -> str:
    """Return the folder of all deletion requests."""
    return "requests/"


def request_key(request: str) -> str:
    """Return the key of a deletion request."""
    return f"requests/{check_id('request', request)}/request.json"


def events_prefix(request: str) -> str:
    """Return the folder of a deletion request's events."""
    return f"requests/{check_id('request', request)}/events/"


def event_key(request: str, number: int) -> str:
    """Return the key of a request's n-th event; six digits, so that key order is the order of events."""
    if not 0 <= number < 1_000_000:
        raise UsageError(f"event number {number} is out of range", "events are numbered from 0 to 999999", "")
    return f"{events_prefix(request)}{number:06d}.json"


def index_prefix(status: str, line: str = "") -> str:
    """Return the folder of the index entries of a status, of one model line or of all."""
    folder = f"index/{check_id('status', status)}/"
    return f"{folder}{check_id('model line', line)}/" if line else folder


def index_key(status: str, line: str, received: int, number: int, request: str) -> str:
    """Return the key of the index entry that says where a request stands after its n-th event.

    Args:
        status: where it stands.
        line: its model line.
        received: when it was received, in whole seconds since 1970.
        number: of the event that put it there; 0 before the first.
        request: its id.
    """
    if not 0 <= received < 10_000_000_000 or not 0 <= number < 1_000_000:
        raise UsageError(f"an index entry of request {request[:80]!r} is out of range", f"{received}, {number}", "")
    return f"{index_prefix(status, line)}{received:010d}.{number:06d}.{check_id('request', request)}"


def run_prefix(run: str) -> str:
    """Return the folder of an unlearning run's documents."""
    return f"runs/{check_id('run', run)}/"


def run_event_key(run: str, number: int) -> str:
    """Return the key of a run's n-th event; six digits, so that key order is the order of events."""
    if not 0 <= number < 1_000_000:
        raise UsageError(f"event number {number} is out of range", "events are numbered from 0 to 999999", "")
    return f"{run_prefix(run)}events/{number:06d}.json"


def version_hold_key(line: str, digest: str) -> str:
    """Return the key of a hold that keeps a superseded version from being purged."""
    return f"holds/{check_id('model line', line)}/{_digest(digest)}.json"


def version_disposal_key(line: str, digest: str) -> str:
    """Return the key of the record of a version's files that were disposed of."""
    return f"{versions_prefix(line)}{_digest(digest)}/disposed.json"


def deltas_prefix() -> str:
    """Return the folder of all files that are stored as their difference to another."""
    return "deltas/sha256/"


def delta_key(digest: str) -> str:
    """Return the key of a file that is stored as its difference to another, by the SHA-256 of the whole file."""
    return f"{deltas_prefix()}{_digest(digest)}"


def addendum_key(request: str, name: str) -> str:
    """Return the key of a document that was added to a request's certificate later."""
    return f"addenda/{check_id('request', request)}/{check_file_name(name)}"


def work_key(digest: str) -> str:
    """Return the key of the note that a piece of work was refused, by the digest of all that it depends on."""
    return f"work/{_digest(digest)}.json"


def run_key(run: str, name: str) -> str:
    """Return the key of a document of an unlearning run."""
    return f"runs/{check_id('run', run)}/{check_file_name(name)}"


def certificate_key(request: str) -> str:
    """Return the key of a request's erasure certificate."""
    return f"certificates/{check_id('request', request)}.json"


def lease_key(line: str) -> str:
    """Return the key of a model line's lease."""
    return f"leases/{check_id('model line', line)}.json"


def scratch_prefix(run: str) -> str:
    """Return the folder of a run's short-lived files."""
    return f"scratch/{check_id('run', run)}/"


def scratch_key(run: str, name: str) -> str:
    """Return the key of a run's short-lived file."""
    return f"{scratch_prefix(run)}{check_file_name(name)}"
