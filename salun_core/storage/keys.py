"""Names that may become part of a path, and the layout of the store: every key is built and recognised here.

Nothing else in the package joins text into a key: each value is checked first, so that no user text can leave its
folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from salun_core.digest import is_digest
from salun_core.errors import IntegrityError, UsageError
from salun_core.storage.s3_settings import variable

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_MAX_KEY_BYTES = 1024  # S3's limit
_MAX_NAME = 200
MAX_SEGMENTS = 4  # of the name of a file in a version: the file and three folders
_SCHEME = "s3://"


def check_id(kind: str, text: str) -> str:
    """Return an id unchanged if it is safe in a key: 1 to 63 of `a-z 0-9 . _ -`, the first a letter or digit.

    `kind` is what it names, such as "model line". The UsageError suggests the nearest valid id.
    """
    if _ID.fullmatch(text):
        return text
    near = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:63]
    raise UsageError(
        f"{kind} {text[:80]!r} is not a valid id",
        "ids are 1 to 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit",
        (f"did you mean {near!r}? " if near else "") + "choose a name of that form",
    )


def check_file_name(text: str) -> str:
    """Return a file name unchanged if it is plain: no folder, no leading dot, at most 128 characters."""
    if _FILE.fullmatch(text):
        return text
    raise UsageError(
        f"{text[:80]!r} is not a plain file name",
        "it may have letters, digits, '.', '_' and '-' only",
        "rename the file and leave folders out",
    )


def check_relative_name(text: str) -> str:
    """Return the name of a file in a folder unchanged if it stays below that folder.

    It has 1 to 4 plain file names joined by `/` and at most 200 characters, such as `unet/config.json`.
    """
    segments = text.split("/")
    if len(text) <= _MAX_NAME and len(segments) <= MAX_SEGMENTS and all(map(_FILE.fullmatch, segments)):
        return text
    raise UsageError(
        f"{text[:80]!r} is neither a plain file name nor one in a plain folder",
        f"it may have {MAX_SEGMENTS} names joined by '/', of letters, digits, '.', '_' and '-', without leading '.'",
        "rename the file or its folder",
    )


def check_tree(names: Collection[str]) -> None:
    """Check that files of these relative names can lie in one folder: no name is also the folder of another one."""
    parts = (name.split("/") for name in names)
    folders = {"/".join(part[:end]) for part in parts for end in range(1, len(part))}
    both = sorted(folders.intersection(names))
    if both:
        raise UsageError(f"{both[0]!r} is a file and a folder at once", "a name can be only one", "rename the file")


def check_key(text: str) -> str:
    """Return a key unchanged if it has at most 1,024 bytes, no empty, `.` or `..` segment and no control character."""
    fits = 0 < len(text.encode(errors="replace")) <= _MAX_KEY_BYTES
    if fits and not _CONTROL.search(text) and not {"", ".", ".."}.intersection(text.split("/")):
        return text
    raise UsageError(
        f"{text[:80]!r} is not a valid key",
        "it is empty, too long, or has an empty, '.' or '..' segment or a control character",
        "write it as plain/segments/of/text",
    )


def _check_digest_text(text: str) -> str:
    if is_digest(text):
        return text
    raise IntegrityError(
        f"{text[:80]!r} is not a digest", "a digest is 64 lower-case hex digits", "pass the whole SHA-256"
    )


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key; the key may be empty and has no trailing slash."""
    bucket, _, key = uri[len(_SCHEME) :].partition("/")
    key = key.rstrip("/")
    if not uri.startswith(_SCHEME) or not _BUCKET.fullmatch(bucket):
        shown = re.sub(r"//[^/@]*@", "//…@", uri)[:120]  # never a password
        raise UsageError(
            f"{shown!r} is not the address of a store", "it must have the form s3://bucket/prefix", _nearest_uri(uri)
        )
    return bucket, check_key(key) if key else ""


def _nearest_uri(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme.lower() in {"http", "https"}:
        return f"put the endpoint into {variable('ENDPOINT_URL')} and write s3://bucket/prefix"
    if separator and scheme.lower() not in {"s3", "s3a", "s3n", "minio"}:
        return "only S3 stores are supported; write s3://bucket/prefix"
    head, _, tail = (rest if separator else uri).strip("/").partition("/")
    bucket = re.sub(r"[^a-z0-9.-]+", "-", head.lower()).strip(".-")
    if not _BUCKET.fullmatch(bucket):
        return "write s3://bucket/prefix; a bucket's name has 3 to 63 lower-case letters, digits, '.' and '-'"
    return f"did you mean {_SCHEME + bucket + ('/' + tail if tail else '')!r}?"


@dataclass(frozen=True)
class _Field:
    """A part of a key: how its text is made (which refuses unsafe input), and how it is recognised."""

    make: Callable[[Any], str]
    pattern: str


def _counter(digits: int) -> _Field:
    def make(number: int) -> str:
        if not 0 <= number < 10**digits:
            raise UsageError(f"{number} is out of range for a key", f"it has at most {digits} digits", "")
        return f"{number:0{digits}d}"  # fixed width: the order of keys is the order of numbers

    return _Field(make, rf"\d{{{digits}}}")


def _check_path(text: str) -> str:
    """Return the path of a file of a run: two folders of its own, and the name that a file of a version may have."""
    *folders, name = text.split("/", 2)
    for folder in folders:
        check_file_name(folder)
    check_relative_name(name)
    return text


_FIELDS: Mapping[str, _Field] = {
    **{
        name: _Field(partial(check_id, kind), _ID.pattern)
        for name, kind in {"line": "model line", "request": "request", "run": "run", "status": "status"}.items()
    },
    "digest": _Field(_check_digest_text, r"[0-9a-f]{64}"),
    "name": _Field(check_file_name, _FILE.pattern),
    "path": _Field(_check_path, r".+"),  # what others wrote below such a folder belongs to it too
    "number": _counter(6),
    "second": _counter(10),
}


class KeyTemplate:
    """One kind of key, as a template with the fields of `_FIELDS` in braces.

    A call with the values in braces, in order, checks each of them and returns the key.
    """

    def __init__(self, template: str) -> None:
        self._template, self._fields = template, re.findall(r"{(\w+)}", template)
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        groups = {name: f"(?P<{name}>{field.pattern})" for name, field in _FIELDS.items()}
        self._pattern = re.compile(pattern.format(**groups))

    def __call__(self, *values: str | int) -> str:
        """Return the key of these values; UsageError or IntegrityError (a digest) if one is not safe in a key."""
        pairs = zip(self._fields, values, strict=True)
        return self._template.format(**{name: _FIELDS[name].make(value) for name, value in pairs})

    def match(self, key: str) -> dict[str, str] | None:
        """Return the values that a key of this kind was built from, or None if it is of another kind."""
        found = self._pattern.fullmatch(key)
        return found.groupdict() if found else None


versions_prefix = KeyTemplate("lines/{line}/versions/")
requests_prefix = KeyTemplate("requests/")
events_prefix = KeyTemplate("requests/{request}/events/")
run_events_prefix = KeyTemplate("runs/{run}/events/")
scratch_prefix = KeyTemplate("scratch/{run}/")
addenda_prefix = KeyTemplate("addenda/{request}/")
version_holds_prefix = KeyTemplate("holds/{line}/")

head_key = KeyTemplate("lines/{line}/HEAD.json")
version_key = KeyTemplate("lines/{line}/versions/{digest}/manifest.json")
version_disposal_key = KeyTemplate("lines/{line}/versions/{digest}/disposed.json")
version_rollback_key = KeyTemplate("lines/{line}/versions/{digest}/rolled-back.json")
version_hold_key = KeyTemplate("holds/{line}/{digest}.json")
blob_key = KeyTemplate("blobs/sha256/{digest}")
request_key = KeyTemplate("requests/{request}/request.json")
event_key = KeyTemplate("requests/{request}/events/{number}.json")
index_key = KeyTemplate("index/{status}/{line}/{second}.{number}.{request}")  # received at, last event, request
run_key = KeyTemplate("runs/{run}/{name}")
run_event_key = KeyTemplate("runs/{run}/events/{number}.json")
scratch_key = KeyTemplate("scratch/{run}/{path}")
certificate_key = KeyTemplate("certificates/{request}.json")
addendum_key = KeyTemplate("addenda/{request}/{path}")
lease_key = KeyTemplate("leases/{line}.json")
work_key = KeyTemplate("work/{digest}.json")  # notes that work was refused, by the digest of all it depends on
trash_key = KeyTemplate("trash/{digest}/{name}")  # of a file that a purge is deleting; each copy has its own name
probe_key = KeyTemplate("probe/{path}")


def index_prefix(status: str, line: str = "") -> str:
    """Return the folder of the index entries of a status, of one model line or of all."""
    folder = f"index/{check_id('status', status)}/"
    return f"{folder}{check_id('model line', line)}/" if line else folder


LAYOUT: Mapping[str, KeyTemplate] = {
    "head": head_key,
    "manifest": version_key,
    "disposed": version_disposal_key,
    "rollback": version_rollback_key,
    "hold": version_hold_key,
    "blob": blob_key,
    "request": request_key,
    "event": event_key,
    "index": index_key,
    "run event": run_event_key,
    "scratch": scratch_key,
    "certificate": certificate_key,
    "addendum": addendum_key,
    "lease": lease_key,
    "work": work_key,
    "trash": trash_key,
    "probe": probe_key,
}
RUN_FILES: Mapping[str, re.Pattern[str]] = {
    "record": re.compile(r"(run|evidence|decision)\.json"),
    "outcome": re.compile(r"outcome\.json"),
    "mark": re.compile(r"(disposed|attested)-[a-z]+\.json"),
    "report": re.compile(r".+\.html"),
    "mask": re.compile(r"mask.*"),
    "candidate": re.compile(r".+\.safetensors"),
}
"""The kinds of files of a run (`run_key`), by their names; the first that fits counts."""


def kind_of_key(key: str) -> tuple[str, Mapping[str, str]]:
    """Return the kind of a key and the values in it; `unknown` for a key that SalUn does not write.

    For example, `scratch/run-1/forget.json` gives `("scratch", {"run": "run-1", "path": "forget.json"})`.
    """
    for kind, template in LAYOUT.items():
        if (values := template.match(key)) is not None:
            return kind, values
    values = run_key.match(key) or {}
    for kind, pattern in RUN_FILES.items():
        if values and pattern.fullmatch(values["name"]):
            return kind, values
    return "unknown", {}
