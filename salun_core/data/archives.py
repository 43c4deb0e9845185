"""WebDataset archives: tar files whose members belong to one sample if their names are equal up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from salun_core.data.decode import fits_memory
from salun_core.data.folders import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from salun_core.data.parquet import MAX_CLASSES
from salun_core.data.spec import DataSpec
from salun_core.data.stored import StoredFile
from salun_core.data.table import Encoded, Origin, Payload, Shard, Table, check_labels
from salun_core.errors import DataError

_MAX_LABEL_BYTES = 1 << 20  # of a `.cls` or `.json`
_MAX_DIGITS = 10  # of a class id


def read_archives(spec: DataSpec, path: Path, files: Sequence[Path] = ()) -> Table:
    """Read uncompressed tar files; nothing is unpacked. Ids are the names of the samples.

    Each sample has one image and its label: a number or a class name in NAME.cls, or `label_column` of NAME.json, which
    may have `subject_column` too. Other members are ignored.
    """
    files = files or (sorted(path.glob("*.tar")) if path.is_dir() else [path])
    places: dict[str, str] = {}
    labels: list[int | str] = []
    subjects: list[str | None] = []
    shards: list[Shard] = []
    size = 0
    for file in files:
        spans: list[tuple[int, int]] = []
        for name, span, label, subject in _samples(spec, file):
            if name in places:
                why = f"it is in {places[name]} and in {file.name}"
                raise DataError(f"sample {name} occurs twice", why, "rename one", public="a sample occurs twice")
            places[name] = file.name
            spans.append(span)
            labels.append(label)
            subjects.append(subject)
        size += sum(length for _, length in spans)
        found = np.array(spans, np.int64).reshape(-1, 2)
        origin = Origin("tar", file, file.stat().st_size, spans=found)
        shards.append(Shard(file.name, len(spans), partial(read_spans, file, found), origin))
    if not labels:
        raise DataError(f"{path.name} holds no samples", "no tar file in it has an image", "check `source`")
    named = [label for label in labels if isinstance(label, str)]
    numbers = [label for label in labels if isinstance(label, int)]
    if named and numbers:
        why = f"{len(numbers)} labels are numbers and {len(named)} are names"
        raise DataError(f"{path.name} has two kinds of labels", why, "use one of them")
    classes = spec.classes or sorted(set(named)) or list(map(str, range(min(max(numbers), MAX_CLASSES) + 1)))
    by_name = {name: index for index, name in enumerate(classes)}
    ids = [by_name.get(label, -1) if isinstance(label, str) else label for label in labels]
    check_labels(ids, len(classes), path.name, labels)
    stored = Encoded(shards)
    payloads: Sequence[Payload] = stored
    if fits_memory(spec, len(ids), size, lambda: stored[0]):
        payloads = list(stored)
    return Table(list(places), ids, payloads, classes, subjects, stored=stored)


_Sample = tuple[str, tuple[int, int], int | str, str | None]  # id, (offset, bytes) of its image, label, subject


def _samples(spec: DataSpec, file: Path) -> Iterator[_Sample]:
    """Yield the samples of an archive; members of one sample follow each other."""
    name, parts = "", dict[str, tuple[int, int]]()
    with _readable(file), tarfile.open(file, "r:") as archive, file.open("rb") as content:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # tarfile would keep millions of them
            place = PurePosixPath(member.name)
            if any("\ud800" <= letter <= "\udfff" for letter in member.name):  # stands for a byte that is not UTF-8
                raise _bad(file, ascii(member.name), "its name is not UTF-8")
            if place.is_absolute() or ".." in place.parts:
                raise _bad(file, member.name, "it leads out of the archive")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise _bad(file, member.name, "it is not a plain file")
            stem, _, ending = place.name.partition(".")
            sample = (place.parent / stem).as_posix()
            if sample != name:
                yield from _sample(spec, file, name, parts, content)
                name, parts = sample, {}
            ending = f".{ending.lower()}"
            kind = "image" if ending in IMAGE_SUFFIXES else ending
            if kind in parts:
                raise _bad(file, member.name, "the sample has two files of this kind")
            parts[kind] = (member.offset_data, member.size)
        yield from _sample(spec, file, name, parts, content)


def _sample(
    spec: DataSpec, file: Path, name: str, parts: Mapping[str, tuple[int, int]], content: BinaryIO
) -> Iterator[_Sample]:
    """Yield a sample of its members; nothing if it has no image, such as a description of the archive."""
    if "image" not in parts:
        return
    if parts["image"][1] > MAX_IMAGE_BYTES:
        raise _bad(file, name, f"its image has over {MAX_IMAGE_BYTES} bytes")
    fields = {}
    for kind in (".cls", ".json"):
        if kind in parts:
            offset, size = parts[kind]
            if size > _MAX_LABEL_BYTES:
                raise _bad(file, name, f"its {kind[1:]} has over {_MAX_LABEL_BYTES} bytes")
            content.seek(offset)
            fields[kind] = content.read(size)
    try:
        document = json.loads(fields.get(".json", b"{}"))
        text = fields[".cls"].decode().strip() if ".cls" in fields else document[spec.label_column]
        subject = document.get(spec.subject_column) if spec.subject_column else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _bad(file, name, "it has no label in .cls or .json") from error
    number = ".cls" in fields and text.isascii() and text.isdecimal() and len(text) < _MAX_DIGITS
    label = int(text) if number else text
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise _bad(file, name, "its label is neither a number nor a name")
    yield name, parts["image"], label, None if subject in (None, "") else str(subject)


def read_spans(file: Path | StoredFile, spans: np.ndarray, places: Sequence[int]) -> Iterator[bytes]:
    """Yield the images at some places of an archive; `spans` [N, 2] has their offsets and sizes in bytes."""
    with _readable(file), file.open("rb") as content:
        for place in places:
            offset, size = spans[place].tolist()
            content.seek(offset)
            data = content.read(size)
            if len(data) != size:
                raise DataError(f"cannot read {file.name}", f"it ends in row {place}", "get it again")
            yield data


@contextmanager
def _readable(file: Path | StoredFile) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError) as error:
        why = str(error).split("\n")[0]
        raise DataError(f"cannot read {file.name}", why, "check that it is a whole, uncompressed tar file") from error


def _bad(file: Path, name: str, why: str) -> DataError:
    return DataError(
        f"{file.name} has the bad member {name[:200]!r}", why, "write the archive again", public="an archive is bad"
    )
