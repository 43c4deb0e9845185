"""Readers: digits, Fashion-MNIST, torchvision names, folders of class folders, parquet in the Hugging Face layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salun_core.config import read_document
from salun_core.data.idx import CLASSES, fashion_mnist
from salun_core.data.spec import DataSpec
from salun_core.data.table import Payload, Table
from salun_core.errors import DataError, UsageError, unknown_name

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_CLASSES = 100_000


def read_digits(spec: DataSpec, train: bool) -> Table:
    """Read scikit-learn's digits: 1,797 real handwritten digits of 8 x 8 pixels, shipped with the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 15.9375).astype(np.uint8)[..., None]
    ids, subjects = [f"{index:06d}" for index in range(len(pixels))], _subjects(spec)
    return Table(
        ids=ids,
        labels=[int(label) for label in digits.target],
        payloads=list(pixels),
        classes=[str(name) for name in digits.target_names],
        subjects=[subjects.get(sample) for sample in ids],
    )


def read_fashion_mnist(spec: DataSpec, train: bool) -> Table:
    """Read one part of Fashion-MNIST, 28 x 28 pixels of grey, from its files on this machine.

    Raises:
        DataError: they are nowhere, or damaged.
    """
    images, labels = fashion_mnist(spec.root, train)
    return Table(
        ids=[f"{index:06d}" for index in range(len(images))],
        labels=[int(label) for label in labels],
        payloads=list(images[..., None]),
        classes=list(CLASSES),
        subjects=[None] * len(images),
    )


def read_torchvision(spec: DataSpec, train: bool) -> Table:
    """Read a torchvision data set that already lies under `root`; nothing is downloaded.

    Raises:
        UsageError: torchvision has no data set of that name.
        DataError: its files are not there.
    """
    import torchvision

    name = spec.source.removeprefix("torchvision:")
    if name not in torchvision.datasets.__all__:
        raise unknown_name("torchvision data set", name, torchvision.datasets.__all__)
    kind = getattr(torchvision.datasets, name)
    try:
        rows = kind() if name == "FakeData" else _open_torchvision(kind, spec.root or "data", train)
        pairs = [rows[index] for index in range(len(rows))]
        labels = [int(label) for _, label in pairs]
        payloads = [_pixels(image) for image, _ in pairs]
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError) as error:
        why = str(error).split("\n")[0]
        raise DataError(
            f"cannot read torchvision's {name}", why, "put its files under `root`; none is downloaded"
        ) from error
    classes = getattr(rows, "classes", None) or [str(index) for index in range(max(labels) + 1)]
    return Table(
        ids=[f"{index:06d}" for index in range(len(pairs))],
        labels=labels,
        payloads=payloads,
        classes=[str(item) for item in classes],
        subjects=[None] * len(pairs),
    )


def _open_torchvision(kind: Callable[..., Any], root: str, train: bool) -> Any:  # noqa: ANN401 - torchvision has no types
    try:
        return kind(root, train=train, download=False)
    except TypeError:
        return kind(root, split="train" if train else "test")


def _pixels(image: Any) -> np.ndarray:  # noqa: ANN401 - a PIL image
    array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"), dtype=np.uint8)
    return array if array.ndim == 3 else array[..., None]


def read_folder(spec: DataSpec, folder: Path) -> Table:
    """Read a folder of class folders (ImageFolder); ids are the paths below it.

    Raises:
        DataError: there is no class folder, or no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.name} is no data set", "it is neither a folder nor a parquet file", "check `source`")
    classes = spec.classes or sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not classes:
        raise DataError(
            f"{folder.name} has no class folders", "an image folder has one folder a class", "check the path"
        )
    paths = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not paths:
        raise DataError(
            f"{folder.name} holds no images", f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}", "check the path"
        )
    ids = [path.relative_to(folder).as_posix() for path, _ in paths]
    subjects = _subjects(spec)
    return Table(
        ids=ids,
        labels=[label for _, label in paths],
        payloads=[_bounded(path) for path, _ in paths],
        classes=classes,
        subjects=[subjects.get(sample) for sample in ids],
    )


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise DataError(f"image {path.name} is too large", f"over {MAX_IMAGE_BYTES} bytes", "remove or shrink it")
    return path.read_bytes()


def _subjects(spec: DataSpec) -> dict[str, str]:
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
    return list(_arrow(path).to_pylist())


def _arrow(path: Path) -> Any:  # noqa: ANN401 - pyarrow has no types
    import pyarrow
    import pyarrow.parquet

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    try:
        return pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {path.name}", str(error).split("\n")[0], "check that it is a whole parquet file"
        ) from error


def read_parquet(spec: DataSpec, path: Path) -> Table:
    """Read parquet with an image and a label column; ids are the images' paths, or row numbers.

    Raises:
        DataError: the file is damaged, or a column is missing.
    """
    table = _arrow(path)
    for column in (spec.image_column, spec.label_column, spec.subject_column):
        if column is not None and column not in table.column_names:
            error = unknown_name("column", column, table.column_names)
            raise DataError(f"{path.name} has no column {column!r}", "", error.remedy)
    images = table.column(spec.image_column).to_pylist()
    labels = table.column(spec.label_column).to_pylist()
    classes = spec.classes or _class_names(table, spec.label_column, path, labels)
    subjects = table.column(spec.subject_column).to_pylist() if spec.subject_column else [None] * len(labels)
    return Table(
        ids=_row_ids(images),
        labels=_label_ids(labels, classes, path),
        payloads=[_encoded(image, index, path) for index, image in enumerate(images)],
        classes=classes,
        subjects=[None if subject in (None, "") else str(subject) for subject in subjects],
    )


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
    largest = max((label for label in labels if isinstance(label, int)), default=-1)
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
    bad = [index for index, label in enumerate(ids) if not 0 <= label < len(classes)]
    if bad:
        raise DataError(
            f"{path.name} has labels outside its {len(classes)} classes",
            f"{len(bad)} rows, the first is row {bad[0]} with label {labels[bad[0]]!r}",
            "correct them, or list all classes in the spec",
        )
    return ids


def _encoded(image: Any, index: int, path: Path) -> Payload:  # noqa: ANN401 - an arrow value
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes) or not data:
        raise DataError(
            f"row {index} of {path.name} has no image bytes", "it is empty or only a path", "embed the images"
        )
    return data


_BY_NAME = {"digits": read_digits, "fashion-mnist": read_fashion_mnist}


def read_table(spec: DataSpec, source: Path | None, train: bool) -> Table:
    """Read the rows of a source.

    Args:
        spec: column names and classes.
        source: a local folder or file; None for names.
        train: which part, for sources that have their own split.

    Returns:
        The rows, images still encoded.

    Raises:
        UsageError: nothing is there.
        DataError: what is there cannot be read.
    """
    if source is None:
        return _BY_NAME.get(spec.source, read_torchvision)(spec, train)
    if not source.exists():
        raise UsageError(f"there is no data at {source}", "the path does not exist", "check `source` in the data spec")
    parquet = source.suffix == ".parquet" or (source.is_dir() and any(source.glob("*.parquet")))
    return read_parquet(spec, source) if parquet else read_folder(spec, source)
