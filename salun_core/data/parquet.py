"""Parquet with image and label columns (the Hugging Face layout), and the table that names each image's subject."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun_core.config import read_document
from salun_core.data.spec import DataSpec
from salun_core.data.table import Payload, Table, check_labels
from salun_core.errors import DataError, unknown_name

MAX_CLASSES = 100_000
_OTHER_NAMES = {"image": "img", "label": "fine_label"}  # of the spec's defaults, in CIFAR-10 and CIFAR-100 on the hub


def arrow_table(files: Sequence[Path]) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Read parquet files as one arrow table, in the order that they are given.

    Raises:
        DataError: one of them is damaged, or their columns differ.
    """
    import pyarrow
    import pyarrow.parquet

    tables, file = [], files[0]
    try:
        for file in files:
            tables.append(pyarrow.parquet.read_table(file))
        return pyarrow.concat_tables(tables)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {file.name}", str(error).split("\n")[0], "check that it is a whole parquet file"
        ) from error


def read_parquet(spec: DataSpec, path: Path, files: Sequence[Path] = ()) -> Table:
    """Read parquet with an image and a label column; ids are the images' paths, or row numbers.

    Args:
        spec: names the columns; where it says nothing of them, `img` and `fine_label` are found too, as the hub's
            CIFAR data sets call them.
        path: a file, or a folder of them.
        files: those of the folder to read; all by default.

    Raises:
        DataError: a file is damaged, a column is missing, or a label is no class.
    """
    table = arrow_table(files or (sorted(path.glob("*.parquet")) if path.is_dir() else [path]))
    image_column, label_column = _columns(spec, table.column_names, path)
    images = table.column(image_column).to_pylist()
    labels = table.column(label_column).to_pylist()
    classes = spec.classes or _class_names(table, label_column, path, labels)
    subjects = table.column(spec.subject_column).to_pylist() if spec.subject_column else [None] * len(labels)
    return Table(
        ids=_row_ids(images),
        labels=_label_ids(labels, classes, path),
        payloads=[_encoded(image, index, path) for index, image in enumerate(images)],
        classes=classes,
        subjects=[None if subject in (None, "") else str(subject) for subject in subjects],
    )


def _columns(spec: DataSpec, names: Sequence[str], path: Path) -> tuple[str, str]:
    """Return the names of the image and the label column; all that the spec names must be there."""
    image, label = _other_name(spec.image_column, names), _other_name(spec.label_column, names)
    for column in filter(None, (image, label, spec.subject_column)):
        if column not in names:
            error = unknown_name("column", column, names)
            raise DataError(f"{path.name} has no column {column!r}", "", error.remedy)
    return image, label


def _other_name(column: str, names: Sequence[str]) -> str:
    other = _OTHER_NAMES.get(column, column)
    return other if column not in names and other in names else column


def _row_ids(images: Sequence[Any]) -> list[str]:
    paths = [image.get("path") if isinstance(image, dict) else None for image in images]
    if all(paths) and len(set(paths)) == len(paths):
        return [str(path) for path in paths]
    return [f"{index:06d}" for index in range(len(images))]


def _class_names(table: Any, column: str, path: Path, labels: Sequence[Any]) -> list[str]:  # noqa: ANN401
    names = _hugging_face_names((table.schema.metadata or {}).get(b"huggingface", b"{}"), column)
    if names:
        return names
    beside = (path if path.is_dir() else path.parent) / "classes.json"
    if beside.is_file():
        document = read_document(beside)
        if not isinstance(document, list):
            raise DataError("classes.json is no list", "it must be a JSON list of names by id", "correct it")
        return [str(name) for name in document]
    if labels and all(isinstance(label, str) for label in labels):
        return sorted(set(labels))
    largest = max((_label_id(label, {}) for label in labels), default=-1)
    return [str(index) for index in range(min(largest, MAX_CLASSES) + 1)]  # a wild label is refused by _label_ids


def _hugging_face_names(metadata: bytes, column: str) -> list[str]:
    """Class names that the datasets library left in the schema; none where it left something else."""
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _label_id(label: Any, by_name: Mapping[str, int]) -> int:  # noqa: ANN401 - an arrow value
    if isinstance(label, str):
        return by_name.get(label, -1)
    return int(label) if isinstance(label, int | float) and label == label // 1 else -1


def _label_ids(labels: Sequence[Any], classes: Sequence[str], path: Path) -> list[int]:
    by_name = {name: index for index, name in enumerate(classes)}
    ids = [_label_id(label, by_name) for label in labels]
    check_labels(ids, len(classes), path.name, labels)
    return ids


def _encoded(image: Any, index: int, path: Path) -> Payload:  # noqa: ANN401 - an arrow value
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes) or not data:
        raise DataError(
            f"row {index} of {path.name} has no image bytes", "it is empty or only a path", "embed the images"
        )
    return data


def subjects_of(spec: DataSpec) -> dict[str, str]:
    """Return the person of each image by sample id; empty where the spec names no metadata.

    Args:
        spec: its `metadata` and `subject_column`.

    Raises:
        DataError: the table cannot be read, or lacks a column.
    """
    if spec.metadata is None or spec.subject_column is None:
        return {}
    path = Path(spec.metadata)
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path)
    if rows and not {"file_name", spec.subject_column} <= rows[0].keys():
        raise DataError(
            f"metadata {path.name} lacks a column",
            f"it needs file_name and {spec.subject_column}",
            "add it, or correct the spec",
        )
    return {str(row["file_name"]): str(row[spec.subject_column]) for row in rows if row[spec.subject_column]}


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read metadata {path.name}", str(error), "check the path") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    return list(arrow_table([path]).to_pylist())
