"""Loads a data set and checks it against its split manifest."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from salun_core.data.by_index import indexed_table
from salun_core.data.decode import decode, fits_memory
from salun_core.data.forget_set import ForgetSet
from salun_core.data.images import ImageSet, ImageSource, Normalisation
from salun_core.data.index import placed
from salun_core.data.readers import read_table
from salun_core.data.spec import BUILTIN, DataSpec
from salun_core.data.split import SplitManifest, SplitName, make_split
from salun_core.data.stored import stored_files
from salun_core.data.stream import DecodedRows, StreamedImages
from salun_core.data.table import Encoded, Table
from salun_core.digest import check_digest
from salun_core.errors import DataError


@dataclass(frozen=True)
class LoadedData:
    """A data set whose rows were checked against its split manifest."""

    spec: DataSpec
    table: Table
    split: SplitManifest

    @cached_property
    def _decoded(self) -> dict[tuple[int, ...], DecodedRows]:
        """The files of streamed images by their shape; they are shared, so that no row is decoded twice."""
        return {}

    @cached_property
    def _streams(self) -> bool:
        """Whether images are streamed: their bytes are in files, and all of them do not fit in memory."""
        payloads, layout = self.table.payloads, self.split.layout
        if layout is None or not self.table.indexed:
            return isinstance(payloads, Encoded)  # the reader decided
        size = sum(shard.size for shard in layout.shards)
        return not fits_memory(self.spec, len(self.table), size, lambda: payloads[0])

    def images(self, name: SplitName, normalisation: Normalisation | None = None) -> ImageSource:
        """Return the images of one split in the order of `SplitManifest.ids`.

        They are decoded in memory, or streamed if the data are larger than memory; streamed images raise DataError when
        they are first read. Without a `normalisation`, it is computed from this split.
        """
        return self.images_of(self.split.ids(name), normalisation)

    def images_of(self, ids: Sequence[str], normalisation: Normalisation | None = None) -> ImageSource:
        """Return the images of some ids, in their order; otherwise as `images`."""
        if not self._streams or not ids:
            return self._image_set(ids, normalisation)
        rows = self.table.rows_of(ids)
        decoded = DecodedRows(self.table, self.spec.size, self.spec.channels, int(rows[0]))
        decoded = self._decoded.setdefault(decoded.shape, decoded)
        streamed = StreamedImages(decoded, rows, self._labels(rows), normalisation, self.spec.augment, ids)
        return streamed if normalisation else streamed.normalised_by(streamed.measured())

    def image_set(self, name: SplitName, normalisation: Normalisation | None = None) -> ImageSet:
        """Decode one split into memory, whatever its size; arguments as for `images`."""
        return self._image_set(self.split.ids(name), normalisation)

    def _image_set(self, ids: Sequence[str], normalisation: Normalisation | None) -> ImageSet:
        images, labels = self.pixels(ids), self._labels(self.table.rows_of(ids))
        return ImageSet(images, labels, normalisation or Normalisation.of(images), self.spec.augment, ids)

    def _labels(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.table.labels_at(rows))

    def pixels(self, ids: Sequence[str]) -> Tensor:
        """Decode samples by id, in the given order, to uint8 [N, C, H, W] in memory.

        Raises IntegrityError if an image that is read from a file now is not the one that the split was made of.
        """
        payloads, rows = self.table.payloads, self.table.rows_of(ids).tolist()
        if isinstance(payloads, Encoded):
            found = {}
            ordered = sorted(set(rows))
            for row, payload in zip(ordered, payloads.read(ordered), strict=True):
                self.table.check_row(row, payload)
                found[row] = payload
            return decode([found[row] for row in rows], ids, self.spec.size, self.spec.channels)
        return decode([payloads[row] for row in rows], ids, self.spec.size, self.spec.channels)

    def forget(self, forget: ForgetSet, normalisation: Normalisation | None = None) -> ImageSource:
        """Return the images of a forget set in the order of the training split, and read no others.

        Raises IntegrityError if the forget set was resolved against another split.
        """
        check_digest("the split of the forget set", self.split.digest, forget.split_digest)
        found = self.split.train.find(forget.ids)
        if len(found) < len(forget.ids):
            raise DataError("forget set names samples outside the training split", "", "resolve it again")
        return self.images_of(sorted(found, key=lambda sample: (found[sample], sample)), normalisation)

    def retain(self, forget: ForgetSet, normalisation: Normalisation | None = None) -> ImageSource:
        """Return the training images that a forget set leaves."""
        gone = set(forget.ids)
        return self.images_of([sample for sample in self.split.ids("train") if sample not in gone], normalisation)


def load_data(spec: DataSpec, split: SplitManifest | None = None) -> LoadedData:
    """Read a data set, still encoded, and check it against its split; create a new split if none is given.

    Raises IntegrityError if the data differ from the split.
    """
    if split is not None and (table := indexed_table(spec, split, lambda: _read_all(spec))) is not None:
        return LoadedData(spec, table, split)
    table = _read_all(spec)
    if split is None:
        split = make_split(table, spec)
    split.check(table)
    return LoadedData(spec, table, split)


def _read_all(spec: DataSpec) -> Table:
    table = _read(spec, spec.source, train=True)
    if spec.brings_test_data:
        table = table.joined(_read(spec, spec.test_source or spec.source, train=False))
    return table


def _read(spec: DataSpec, source: str, train: bool) -> Table:
    spec = spec.model_copy(update={"source": source})
    of: Literal["source", "test_source"] = "source" if train else "test_source"
    if source in BUILTIN or source.startswith("torchvision:"):
        return read_table(spec, None, train)
    if not source.startswith("s3://"):
        return placed(read_table(spec, Path(source), train), Path(source), of)
    held = _Download()
    folder = _download(source, held.folder)
    table = placed(read_table(spec, folder, train), folder, of)
    if not isinstance(table.payloads, Encoded):
        return table
    return replace(table, payloads=replace(table.payloads, held=(held,)))


class _Download:
    """A temporary folder that exists as long as this object: rows of downloaded files are read when needed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="salun-data-"))
        weakref.finalize(self, _remove, self.folder, os.getpid())


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process that ends must leave it to the others
        shutil.rmtree(folder, ignore_errors=True)


def _download(source: str, folder: Path) -> Path:
    files = stored_files(source)
    if not files:
        raise DataError(
            f"there is no data at {source}", "no object has that prefix", "check the address in the data spec"
        )
    root = folder / (source.rstrip("/").rpartition("/")[2] or "data")
    for name, file in files.items():
        path = root / name if name else root
        path.parent.mkdir(parents=True, exist_ok=True)
        file.store.download(file.key, path)
    return root
