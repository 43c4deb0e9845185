"""The table beside the images: which person each of them shows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from salun_core.data.parquet import arrow_table
from salun_core.data.spec import DataSpec
from salun_core.errors import DataError


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
