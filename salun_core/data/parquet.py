"""Tabular files: parquet or Arrow with image and label columns (as Hugging Face has them), and tables of subjects."""

from __future__ import annotations

import csv
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from salun_core.config import read_document
from salun_core.data.spec import DataSpec
from salun_core.data.stored import StoredFile, for_arrow
from salun_core.data.table import Encoded, Origin, Payload, Shard, Table, check_labels
from salun_core.errors import DataError, unknown_name

MAX_CLASSES = 100_000  # far above real data sets; a corrupt label must not create millions of class names
EXPANDED_BYTES = 256 * 1024 * 1024  # what a small file may become in memory: some thousand images
EXPANSION = 32  # times its size: what a large one may become. Encoded images hardly shrink in parquet, bitmaps tenfold
_STATE = "state.json"  # of the datasets library
_LET_ALONE = "do not change the data during a run"
_BATCH_ROWS = 256  # rows of a streamed file that are in memory at once, and the buffer of its column
_BUFFER = 1 << 20
_ROW_BYTES = 64  # of Python's objects for a row
_OTHER_NAMES = {"image": "img", "label": "fine_label"}  # default column -> its name in the hub's CIFAR-10 and -100

_File = Path | StoredFile


def arrow_table(files: Sequence[Path], columns: Sequence[str] | None = None) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Read parquet files, in the given order, as one arrow table. Texts and bytes stay dictionaries.

    A few hundred bytes can describe gigabytes: zeros that were compressed, or one value that every row repeats. So a
    file is measured in two steps, by what its footer says before anything is read, and by what its dictionaries would
    become before a value is copied.
    """
    import pyarrow
    import pyarrow.parquet

    tables = []
    for file in files:
        with readable(file.name):
            limit = max(EXPANDED_BYTES, EXPANSION * file.stat().st_size)
            opened = pyarrow.parquet.ParquetFile(file)
            claimed = claimed_bytes(opened.metadata, range(opened.metadata.num_row_groups), columns)
            _check_expansion(file, claimed, limit)
            schema = opened.metadata.schema
            leaves = [schema.column(place) for place in range(len(schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            table = pyarrow.parquet.read_table(file, columns=columns, read_dictionary=texts)
            chunks = [chunk for column in table.columns for chunk in column.chunks]
            _check_expansion(file, sum(map(expanded_bytes, chunks)), limit)
            tables.append(table)
    with readable(files[-1].name):
        return pyarrow.concat_tables(tables)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise exceptions of pyarrow and of the system as DataError about the named file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {name}", str(error).split("\n")[0], "check that it is a whole parquet file"
        ) from error


def claimed_bytes(metadata: Any, groups: Iterable[int], columns: Sequence[str] | None = None) -> int:  # noqa: ANN401
    """Return how many bytes row groups hold by the file's own footer, and what their rows take as Python objects."""
    total = 0
    for group in groups:
        total += metadata.row_group(group).num_rows * _ROW_BYTES
        for place in range(metadata.num_columns):
            chunk, leaf = metadata.row_group(group).column(place), metadata.schema.column(place)
            if columns is None or any(f"{leaf.path}.".startswith(f"{column}.") for column in columns):
                fixed = chunk.num_values * leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
                total += max(chunk.total_uncompressed_size, fixed)
    return total


def expanded_bytes(array: Any) -> int:  # noqa: ANN401
    """Return how many bytes an array takes when its dictionaries are replaced by their values."""
    import pyarrow
    import pyarrow.compute

    kind = array.type
    if pyarrow.types.is_struct(kind) or pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        inside = array.flatten()
        return sum(map(expanded_bytes, inside if isinstance(inside, list) else [inside]))
    if pyarrow.types.is_dictionary(kind) and (
        pyarrow.types.is_binary(kind.value_type) or pyarrow.types.is_string(kind.value_type)
    ):
        sizes = pyarrow.compute.binary_length(array.dictionary).cast(pyarrow.int64())
        return int(pyarrow.compute.sum(sizes.take(array.indices)).as_py() or 0)
    return int(array.nbytes)


def _check_expansion(file: _File, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{file.name} expands too far",
            f"{file.stat().st_size / 1e3:.1f} kB would become {size / 1e9:.1f} GB",
            "give images as JPEG or PNG in the file, which do not shrink further",
        )


def read_parquet(spec: DataSpec, path: Path, files: Sequence[Path] = ()) -> Table:
    """Read parquet with an image and a label column; ids are the images' paths, or row numbers.

    A default column that is missing falls back to `img` or `fine_label`. `files` limits which files of a folder are
    read.
    """
    import pyarrow.parquet

    files = files or (sorted(path.glob("*.parquet")) if path.is_dir() else [path])
    with readable(files[0].name):
        schema = pyarrow.parquet.read_schema(files[0])
    image_column, label_column = _columns(spec, schema.names, path)
    stored, in_memory = _stored(spec, files, image_column)
    payloads = None if in_memory else stored
    columns = [column for column in (image_column, label_column, spec.subject_column) if column]
    table = arrow_table(files, columns[1:] if payloads else columns)
    labels = table.column(label_column).to_pylist()
    if not payloads:
        paths = _paths(table.column(image_column).chunks)
    elif "path" in _leaves(schema.field(image_column).type):  # a column of its own is read out of its struct
        paths = arrow_table(files, [f"{image_column}.path"]).column(0).to_pylist()
    else:
        paths = []
    subjects = table.column(spec.subject_column).to_pylist() if spec.subject_column else ()
    found: Sequence[Payload] = payloads or [
        _encoded(image, index, path) for index, image in enumerate(table.column(image_column).to_pylist())
    ]
    names = spec.classes or _class_names(table.schema.metadata, label_column, path, labels)
    return _table(path, (_row_ids(paths, len(labels)), found, stored), labels, names, subjects)


def _table(
    path: Path,
    rows: tuple[Sequence[str], Sequence[Payload], Encoded],
    labels: Sequence[Any],
    classes: Sequence[str],
    subjects: Sequence[Any],
) -> Table:
    """Build a table of ids, payloads and their places, with labels and subjects as the columns have them."""
    by_name = {name: index for index, name in enumerate(classes)}
    ids = [_label_id(label, by_name) for label in labels]
    check_labels(ids, len(classes), path.name, labels)
    known = [None if subject in (None, "") else str(subject) for subject in subjects]
    return Table(ids=rows[0], labels=ids, payloads=rows[1], classes=classes, subjects=known, stored=rows[2])


def is_saved(folder: Path) -> bool:
    """Whether the datasets library wrote a folder, with `save_to_disk`."""
    return (folder / _STATE).is_file() and (folder / "dataset_info.json").is_file()


def read_saved(spec: DataSpec, folder: Path) -> Table:
    """Read the Arrow files of a data set that was saved with `Dataset.save_to_disk`; columns as for parquet."""
    state = read_document(folder / _STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    named = [str(item.get("filename")) for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not named or any(Path(name).name != name for name in named):
        raise DataError(f"{_STATE} of {folder.name} is damaged", "it names no files in the folder", "save it again")
    metadata, paths, labels, subjects = {}, list[str | None](), list[Any](), list[Any]()
    shards, size, columns = [], 0, ("", "")
    for file in (folder / name for name in named):
        count = 0
        for batch in _arrow_batches(file):
            metadata, columns = batch.schema.metadata, _columns(spec, batch.schema.names, file)
            labels += batch.column(columns[1]).to_pylist()
            subjects += batch.column(spec.subject_column).to_pylist() if spec.subject_column else []
            column = batch.column(columns[0])
            paths += _paths([column])
            count, size = count + len(batch), size + column.nbytes
        origin = Origin("arrow", file, file.stat().st_size, columns[0])
        shards.append(Shard(file.name, count, partial(read_arrow, file, columns[0], count), origin))
    from salun_core.data.decode import fits_memory

    names = spec.classes or _class_names(metadata, columns[1], folder, labels)
    stored = Encoded(shards)
    in_memory = not labels or fits_memory(spec, len(labels), size, lambda: stored[0])
    payloads: Sequence[Payload] = list(stored) if in_memory else stored
    return _table(folder, (_row_ids(paths, len(labels)), payloads, stored), labels, names, subjects)


def _arrow_batches(file: _File) -> Iterator[Any]:
    """Yield the record batches of an Arrow stream; one is in memory at a time, as large as its writer made it."""
    import pyarrow

    with readable(file.name):
        limit = max(EXPANDED_BYTES, EXPANSION * file.stat().st_size)
        with for_arrow(file) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                _check_expansion(file, sum(map(expanded_bytes, batch.columns)), limit)
                yield batch


def read_arrow(file: _File, column: str, rows: int, places: Sequence[int]) -> Iterator[Payload]:
    """Yield the images in some rows of an Arrow stream, given in ascending order; it is read from its start.

    Raises DataError if the file is missing or damaged, expands too far, or has another number of rows than before.
    """
    start = 0
    for batch in _arrow_batches(file):
        end = min(start + len(batch), rows)
        wanted = places[bisect_left(places, start) : bisect_left(places, end)]
        for place in wanted:
            yield _encoded(batch.column(column)[place - start].as_py(), place, file)
        start += len(batch)
    if start != rows:
        raise DataError(f"{file.name} changed", f"it has {start} rows, and had {rows}", _LET_ALONE)


def _leaves(kind: Any) -> list[str]:  # noqa: ANN401 - pyarrow has no types
    """Return the names of the fields of a struct; none for another type."""
    import pyarrow

    return [field.name for field in kind] if pyarrow.types.is_struct(kind) else []


def _stored(spec: DataSpec, files: Sequence[Path], column: str) -> tuple[Encoded, bool]:
    """Return the rows of an image column as they are in the files, and whether they fit in memory."""
    import pyarrow.parquet

    from salun_core.data.decode import fits_memory  # it imports torch, which readers of splits and metadata do without

    shards, size = [], 0
    for file in files:
        with readable(file.name):
            metadata = pyarrow.parquet.read_metadata(file)
            size += claimed_bytes(metadata, range(metadata.num_row_groups), [column])
            origin, rows = Origin("parquet", file, file.stat().st_size, column), metadata.num_rows
            shards.append(Shard(file.name, rows, partial(read_rows, file, column, rows), origin))
    stored = Encoded(shards)
    return stored, not len(stored) or fits_memory(spec, len(stored), size, lambda: stored[0])


def read_rows(file: _File, column: str, rows: int, places: Sequence[int]) -> Iterator[Payload]:
    """Yield the images in some rows of a file, given in ascending order; one small batch is in memory at a time.

    It reads the footer, and only the row groups of the column that have these rows. Raises DataError as `read_arrow`
    does.
    """
    import pyarrow.parquet

    with readable(file.name), for_arrow(file) as source:
        size = file.stat().st_size
        limit = max(EXPANDED_BYTES, EXPANSION * size)
        with pyarrow.parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as opened:
            metadata = opened.metadata
            if metadata.num_rows != rows or column not in opened.schema_arrow.names:
                why = f"it has {metadata.num_rows} rows, and had {rows}"
                raise DataError(f"{file.name} changed", why, _LET_ALONE)
            _check_expansion(file, claimed_bytes(metadata, range(metadata.num_row_groups), [column]), limit)
            leaf = f"{column}.bytes" if "bytes" in _leaves(opened.schema_arrow.field(column).type) else column
            if leaf not in [metadata.schema.column(place).path for place in range(metadata.num_columns)]:
                raise _without_bytes(0, file)
        options: dict[str, Any] = {"metadata": metadata, "read_dictionary": [leaf], "buffer_size": _BUFFER}
        with for_arrow(file) as again, pyarrow.parquet.ParquetFile(again, pre_buffer=False, **options) as opened:
            first = 0  # row of the group
            for group in range(metadata.num_row_groups):
                last = first + metadata.row_group(group).num_rows
                wanted = places[bisect_left(places, first) : bisect_left(places, last)]
                if wanted:
                    yield from _of_group(opened, group, leaf, [place - first for place in wanted], (file, first))
                first = last


def _of_group(opened: Any, group: int, leaf: str, places: Sequence[int], where: tuple[_File, int]) -> Iterator[Payload]:  # noqa: ANN401
    (file, first), start = where, 0
    for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[leaf]):
        end = start + len(batch)
        values = batch.column(0)
        for place in places[bisect_left(places, start) : bisect_left(places, end)]:
            yield _encoded(values[place - start].as_py(), first + place, file)
        if places[-1] < end:
            return
        start = end


def _columns(spec: DataSpec, names: Sequence[str], path: Path) -> tuple[str, str]:
    """Return the names of the image and the label column; every column of the spec must exist."""
    other = {name: other for name, other in _OTHER_NAMES.items() if name not in names and other in names}
    image, label = (other.get(column, column) for column in (spec.image_column, spec.label_column))
    for column in filter(None, (image, label, spec.subject_column)):
        if column not in names:
            error = unknown_name("column", column, names)
            raise DataError(f"{path.name} has no column {column!r}", "", error.remedy)
    return image, label


def _paths(chunks: Iterable[Any]) -> list[str | None]:
    """Return the paths in an image column, if it has them."""
    found: list[str | None] = []
    for chunk in chunks:
        found += chunk.field("path").to_pylist() if "path" in _leaves(chunk.type) else [None] * len(chunk)
    return found


def _row_ids(paths: Sequence[str | None], rows: int) -> list[str]:
    if paths and all(paths) and len(set(paths)) == len(paths):
        return [str(path) for path in paths]
    return [f"{index:06d}" for index in range(rows)]


def _class_names(metadata: Mapping[bytes, bytes] | None, column: str, path: Path, labels: Sequence[Any]) -> list[str]:
    """Return the class names from the schema, from `classes.json` in the same folder, or from the labels."""
    names = _hugging_face_names((metadata or {}).get(b"huggingface", b"{}"), column)
    if names:
        return names
    file = (path if path.is_dir() else path.parent) / "classes.json"
    if file.is_file():
        document = read_document(file)
        if not isinstance(document, list):
            raise DataError("classes.json is not a list", "it must be a JSON list of names by id", "correct it")
        return [str(name) for name in document]
    if labels and all(isinstance(label, str) for label in labels):
        return sorted(set(labels))
    largest = max((_label_id(label, {}) for label in labels), default=-1)
    return [str(index) for index in range(min(largest, MAX_CLASSES) + 1)]  # `check_labels` refuses larger labels


def _hugging_face_names(metadata: bytes, column: str) -> list[str]:
    """Return the class names that the datasets library writes into the schema, if present."""
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _label_id(label: Any, by_name: Mapping[str, int]) -> int:  # noqa: ANN401 - an arrow value
    """Return a class id, or -1 for a value that is not a class: an unknown name, a fraction, NaN, null."""
    if isinstance(label, str):
        return by_name.get(label, -1)
    return int(label) if isinstance(label, int | float) and label == label // 1 else -1


def _encoded(image: Any, index: int, path: _File) -> Payload:  # noqa: ANN401 - an arrow value
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes) or not data:
        raise _without_bytes(index, path)
    return data


def _without_bytes(index: int, path: _File) -> DataError:
    return DataError(
        f"row {index} of {path.name} has no image bytes",
        "it is empty or only a path",
        "embed the images",
        public="a row of the data has no image bytes",
    )


def subjects_of(spec: DataSpec) -> dict[str, str]:
    """Return the person in each image by sample id; empty if the spec names no metadata."""
    if spec.metadata is None or spec.subject_column is None:
        return {}
    path = Path(spec.metadata)
    rows: list[dict[str, Any]]
    if path.suffix == ".parquet":
        rows = arrow_table([path]).to_pylist()
    else:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"cannot read metadata {path.name}", str(error), "check the path") from error
    if rows and not {"file_name", spec.subject_column} <= rows[0].keys():
        raise DataError(
            f"metadata {path.name} lacks a column",
            f"it needs file_name and {spec.subject_column}",
            "add it, or correct the spec",
        )
    return {str(row["file_name"]): str(row[spec.subject_column]) for row in rows if row[spec.subject_column]}
