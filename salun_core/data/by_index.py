"""Builds the table of a data set from its row index: rows are read from the files when they are needed, no others."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from salun_core.data.archives import read_spans
from salun_core.data.folders import MAX_IMAGE_BYTES, check_inside, read_images
from salun_core.data.index import Layout, ShardFile, unsafe
from salun_core.data.parquet import read_arrow, read_rows, subjects_of
from salun_core.data.rows import PARTS, Group, whole
from salun_core.data.spec import DataSpec
from salun_core.data.split import SplitManifest
from salun_core.data.stored import StoredFile, StoredFolder, stored_files
from salun_core.data.table import Encoded, Payload, Shard, Table, Texts
from salun_core.errors import DataError

_File = Path | StoredFile | StoredFolder
_AHEAD = 16  # images of a folder in a store that are requested at once
_REMEDY = "restore the data as they were when the model was trained"


def indexed_table(spec: DataSpec, split: SplitManifest, read_all: Callable[[], Table]) -> Table | None:
    """Build the rows of a split from its index, in the order of the files, without reading an image.

    Only the sizes of the files are checked here; each row is compared with its digest when it is read. Returns None if
    the split has no index, the index does not fit the spec, or the source has none of its files: then all data must be
    read.
    """
    layout = split.layout
    if layout is None or not layout.fits(spec):
        return None
    sources = {"source": _source(spec.source), "test_source": _source(spec.test_source or spec.source)}
    files = [sources[shard.of].find(shard) for shard in layout.shards]
    if not any(files):
        return None
    for shard, file in zip(layout.shards, files, strict=True):
        _check(shard, file)
    groups = list(whole([getattr(split, part) for part in PARTS]))
    return _table(spec, layout, groups, [file for file in files if file is not None], read_all)


def _check(shard: ShardFile, file: _File | None) -> None:
    name, public = shard.name or shard.of, "the files of the data are not those that the model was trained on"
    if file is None:
        raise DataError(f"{name} is missing", "the row index of the model names it", _REMEDY, public=public)
    if shard.kind != "images" and not isinstance(file, StoredFolder):
        size = file.stat().st_size
        if size != shard.size:
            why = f"it has {size} bytes, and had {shard.size} when the rows were indexed"
            raise DataError(f"{name} has another size", why, _REMEDY, public=public)


def _table(
    spec: DataSpec, layout: Layout, groups: Sequence[Group], files: Sequence[_File], read_all: Callable[[], Table]
) -> Table:
    import pyarrow

    where = np.concatenate([group.where for group in groups if group.where is not None])
    ids = pyarrow.chunked_array([group.ids for group in groups])
    hashes = np.concatenate([group.digests for group in groups])
    persons = [group.subjects for group in groups if group.subjects is not None]
    subjects = pyarrow.chunked_array(persons) if persons else None
    order = np.lexsort((where["place"], where["shard"]))
    if bool((order[1:] < order[:-1]).any()):  # ids sort in another way than the files
        place = pyarrow.array(order)
        where, ids, hashes = where[order], ids.take(place), hashes[order]
        subjects = subjects.take(place) if subjects is not None else None
    names, shards = Texts(ids), []
    ends = np.searchsorted(where["shard"], np.arange(len(files)), side="right").tolist()
    for number, (shard, file) in enumerate(zip(layout.shards, files, strict=True)):
        start = ends[number - 1] if number else 0
        rows = where[start : ends[number]]
        places = None if shard.kind in ("tar", "images") else rows["place"]
        read = _reader(shard, file, rows, (names[start : ends[number]], hashes[start : ends[number]]))
        shards.append(Shard(file.name, len(rows), read, places=places))
    table = Table(
        ids=names,
        labels=array("q", where["label"].astype(np.int64).tobytes()),
        payloads=Encoded(shards),
        classes=layout.classes,
        subjects=Texts(subjects) if subjects is not None else _from_metadata(spec, layout, ends, names),
        others=None if len(where) == layout.rows else lambda: _others(layout, read_all),
    )
    table.__dict__["row_hashes"] = hashes  # of the split, not of the files
    return table


def _from_metadata(spec: DataSpec, layout: Layout, ends: Sequence[int], names: Texts) -> Sequence[str | None]:
    """Return the persons from the table that a spec names, as readers of folders do; empty without one."""
    known = subjects_of(spec)
    if not known:
        return ()
    return [
        known.get(sample.removeprefix(shard.prefix))
        for shard, start, end in zip(layout.shards, [0, *ends], ends, strict=False)
        for sample in names[start:end]
    ]


def _others(layout: Layout, read_all: Callable[[], Table]) -> Table:
    """Return a table that knows all ids of the data, also those that were forgotten or are over a limit."""
    if not layout.numbered or layout.columns["subject_column"]:
        return read_all()
    rows: dict[str, int] = {}
    for shard in layout.shards:
        rows[shard.prefix] = rows.get(shard.prefix, 0) + shard.rows
    ids = [f"{prefix}{row:06d}" for prefix, count in rows.items() for row in range(count)]
    return Table(ids, [0] * len(ids), [], layout.classes)


def _reader(
    shard: ShardFile, file: _File, rows: np.ndarray, known: tuple[Texts, np.ndarray]
) -> Callable[[Sequence[int]], Iterator[Payload]]:
    """Return what reads rows of a shard by their positions in the index; `known` has their ids and digests."""
    ids, hashes = known
    if isinstance(file, StoredFolder):
        return lambda wanted: _images(
            file,
            [_name(ids[row], shard) for row in wanted],
            [f"row {hashes[row].tobytes().hex()}" for row in wanted],
        )
    if shard.kind == "images":
        return lambda wanted: _local_images(file, [_name(ids[row], shard) for row in wanted])
    if shard.kind == "tar":
        spans = np.stack([rows["place"], rows["size"]], axis=1)
        return lambda wanted: read_spans(file, spans, wanted)
    read = read_rows if shard.kind == "parquet" else read_arrow
    return lambda wanted: read(file, shard.column, shard.rows, rows["place"][list(wanted)].tolist())


def _name(sample: str, shard: ShardFile) -> str:
    name = sample.removeprefix(shard.prefix)
    if unsafe(name):
        raise DataError("an id leads out of the data", repr(name[:200]), _REMEDY, public="an id of the data is bad")
    return name


def _local_images(folder: _File, names: Sequence[str]) -> Iterator[bytes]:
    assert isinstance(folder, Path)
    for name in names:
        check_inside(folder, name)
        yield from read_images(folder, [name], [0])


def _images(folder: StoredFolder, names: Sequence[str], identities: Sequence[str]) -> Iterator[bytes]:
    """Yield images of a store; the next ones are requested while one is in use."""
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for name, identity in zip(names, identities, strict=True):
                waiting.append(pool.submit(folder.read, name, MAX_IMAGE_BYTES, identity))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Local:
    """A folder or a file on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, shard: ShardFile) -> Path | None:
        """Return the file of a shard; None if it does not exist."""
        path = self._path / shard.name if shard.name else self._path
        return path if (path.is_dir() if shard.kind == "images" else path.is_file()) else None


class _Stored:
    """A prefix or an object in a store; it is listed once, and only for files."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    @cached_property
    def _files(self) -> dict[str, StoredFile]:
        return stored_files(self._uri)

    def find(self, shard: ShardFile) -> StoredFile | StoredFolder | None:
        """Return the object of a shard; None if it does not exist. A folder is known to exist when it is read."""
        return StoredFolder.of(self._uri, shard.name) if shard.kind == "images" else self._files.get(shard.name)


def _source(uri: str) -> _Local | _Stored:
    return _Stored(uri) if uri.startswith("s3://") else _Local(Path(uri))
