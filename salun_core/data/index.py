"""The row index of a split: where each row is in the files of the data, with its label and its person.

A step with an index reads the rows that it needs and no others. Without one it has to read all data, to find out what
is in them. The index is a part of the split's file, so it has the same life: the split of a child lacks what was
forgotten, a purge deletes both, and the version's manifest has the digest of both.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from salun_core.config import Document
from salun_core.data.spec import DataSpec
from salun_core.data.table import Encoded, Shard, Table

INDEXED_ROWS = 100_000  # and more have an index, and so has all that is streamed
WHERE = np.dtype([("label", "<i4"), ("shard", "<i4"), ("place", "<i8"), ("size", "<i8")])
"""A row of an index: its label, number of its shard, and its place there: number, or offset and size in bytes."""

Kind = Literal["parquet", "arrow", "tar", "images"]


class ShardFile(Document):
    """A file of the data, or a folder of images."""

    kind: Kind = Field(description="what it is")
    of: Literal["source", "test_source"] = Field(description="the field of the data spec that it belongs to")
    name: str = Field(description="relative to the source; empty for the source itself")
    rows: int = Field(ge=0, description="how many it has, also those that no part of the split has")
    size: int = Field(ge=0, description="in bytes; 0 for a folder")
    column: str = Field(default="", description="of the images")
    prefix: Literal["", "train/", "test/"] = Field(default="", description="of the ids, where two parts were joined")

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        if unsafe(name):
            raise ValueError("a shard leads out of the data")
        return name


class Layout(Document):
    """What an index was made from."""

    shards: list[ShardFile] = Field(min_length=1, description="in the order of the rows")
    classes: list[str] = Field(description="class names by id")
    columns: dict[str, str | list[str] | None] = Field(description="fields of the data spec that rows depend on")
    numbered: bool = Field(description="whether ids are numbers of rows")

    @property
    def rows(self) -> int:
        """How many rows the data have."""
        return sum(shard.rows for shard in self.shards)

    def fits(self, spec: DataSpec) -> bool:
        """Return whether rows that a spec describes are those of the index, if the files are."""
        two = any(shard.of == "test_source" for shard in self.shards)
        return columns_of(spec) == self.columns and two == (spec.test_source is not None)


def unsafe(name: str) -> bool:
    """Return whether a relative name may lead out of its folder."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def columns_of(spec: DataSpec) -> dict[str, str | list[str] | None]:
    """Return the fields of a spec that ids, labels and images depend on."""
    return {
        "image_column": spec.image_column,
        "label_column": spec.label_column,
        "subject_column": spec.subject_column,
        "classes": spec.classes,
    }


def placed(table: Table, source: Path, of: Literal["source", "test_source"]) -> Table:
    """Return a table whose files are named relative to the source that they were read from."""
    if table.stored is None:
        return table

    def relative(shard: Shard) -> Shard:
        if shard.origin is None:
            return shard
        name = Path(os.path.relpath(shard.origin.path, source))
        return replace(shard, origin=replace(shard.origin, path=name, of=of))

    return replace(table, stored=replace(table.stored, shards=[relative(shard) for shard in table.stored.shards]))


def layout_of(table: Table, spec: DataSpec) -> Layout | None:
    """Return the layout of a table that is to have an index; None for others."""
    large = isinstance(table.payloads, Encoded) or len(table) >= INDEXED_ROWS
    if table.stored is None or not large or not len(table):
        return None
    shards, numbered, start = [], True, 0
    places: dict[str, int] = {}
    for shard in table.stored.shards:
        origin = shard.origin
        if origin is None:
            return None
        name = "" if origin.path == Path() else origin.path.as_posix()
        shards.append(
            ShardFile(
                kind=origin.kind,
                of=origin.of,
                name=name,
                rows=shard.rows,
                size=origin.size,
                column=origin.column,
                prefix=origin.prefix,
            )
        )
        first = places.setdefault(origin.prefix, start)
        numbered = numbered and all(
            table.ids[row] == f"{origin.prefix}{row - first:06d}" for row in range(start, start + shard.rows)
        )
        start += shard.rows
    return Layout(shards=shards, classes=list(table.classes), columns=columns_of(spec), numbered=numbered)


def where_of(table: Table) -> np.ndarray:
    """Return where each row of a table is, as `WHERE` [N]."""
    assert table.stored is not None
    where = np.zeros(len(table), WHERE)
    where["label"] = table.labels
    start = 0
    for number, shard in enumerate(table.stored.shards):
        rows = where[start : start + shard.rows]
        rows["shard"], rows["place"] = number, np.arange(shard.rows)
        if shard.origin is not None and shard.origin.spans is not None:
            rows["place"], rows["size"] = shard.origin.spans.T
        start += shard.rows
    return where


def where_fault(layout: Layout, where: np.ndarray) -> str:
    """Return what is wrong with rows of an index, in words; empty if nothing is."""
    if not bool(((where["shard"] >= 0) & (where["shard"] < len(layout.shards))).all()):
        return "a row is in a shard that it does not name"
    if not bool(((where["label"] >= 0) & (where["label"] < len(layout.classes))).all()):
        return "a row has a label that is not a class"
    tar = np.array([shard.kind == "tar" for shard in layout.shards])[where["shard"]]
    ends = np.array([shard.size if shard.kind == "tar" else shard.rows for shard in layout.shards])[where["shard"]]
    last = where["place"] + np.where(tar, where["size"], 1)
    if bool(((where["place"] < 0) | (where["size"] < 0) | (last > ends)).any()):
        return "a row is behind the end of its shard"
    return ""
