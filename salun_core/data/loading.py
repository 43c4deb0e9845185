"""Loads a data set and checks it against its split manifest."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from salun_core.data.decode import decode
from salun_core.data.forget_set import ForgetSet
from salun_core.data.images import ImageSet, ImageSource, Normalisation
from salun_core.data.readers import read_table
from salun_core.data.spec import BUILTIN, DataSpec
from salun_core.data.split import SplitManifest, SplitName, make_split
from salun_core.data.stream import DecodedRows, StreamedImages
from salun_core.data.table import Encoded, Table
from salun_core.digest import check_digest
from salun_core.errors import DataError
from salun_core.storage import open_store


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

    def images(self, name: SplitName, normalisation: Normalisation | None = None) -> ImageSource:
        """Return the images of one split: decoded in memory, or streamed if the data are larger than memory.

        Args:
            name: train, validation or test.
            normalisation: normalisation of the model; None computes it from this split.

        Returns:
            The images in the order of `SplitManifest.ids`.

        Raises:
            DataError: an image is corrupt, or sizes differ. Streamed images raise it when they are first read.
        """
        ids = self.split.ids(name)
        if not isinstance(self.table.payloads, Encoded) or not ids:
            return self.image_set(name, normalisation)
        rows = [self.table.position[sample] for sample in ids]
        decoded = DecodedRows(self.table, self.spec.size, self.spec.channels, rows[0])
        decoded = self._decoded.setdefault(decoded.shape, decoded)
        streamed = StreamedImages(decoded, np.array(rows), self._labels(rows), normalisation, self.spec.augment, ids)
        return streamed if normalisation else streamed.normalised_by(streamed.measured())

    def image_set(self, name: SplitName, normalisation: Normalisation | None = None) -> ImageSet:
        """Decode one split into memory, whatever its size; arguments as for `images`."""
        ids = self.split.ids(name)
        images = self.pixels(ids)
        labels = self._labels([self.table.position[sample] for sample in ids])
        return ImageSet(images, labels, normalisation or Normalisation.of(images), self.spec.augment, ids)

    def _labels(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self.table.labels[row] for row in rows], dtype=torch.int64)

    def pixels(self, ids: Sequence[str]) -> Tensor:
        """Decode samples by id, in the given order, to uint8 [N, C, H, W] in memory.

        Raises:
            DataError: an image is corrupt, or sizes differ.
        """
        payloads, rows = self.table.payloads, [self.table.position[sample] for sample in ids]
        if isinstance(payloads, Encoded):
            ordered = sorted(set(rows))
            found = dict(zip(ordered, payloads.read(ordered), strict=True))
            return decode([found[row] for row in rows], ids, self.spec.size, self.spec.channels)
        return decode([payloads[row] for row in rows], ids, self.spec.size, self.spec.channels)

    def forget_and_retain(self, train: ImageSource, forget: ForgetSet) -> tuple[ImageSource, ImageSource]:
        """Split the training images into forget set and retain set.

        Raises:
            IntegrityError: the forget set was resolved against another split.
            DataError: the forget set contains a sample that is not in the training split.
        """
        check_digest("the split of the forget set", self.split.digest, forget.split_digest)
        wanted = set(forget.ids)
        if not wanted <= set(train.ids):
            raise DataError("forget set names samples outside the training split", "", "resolve it again")
        inside = [index for index, sample in enumerate(train.ids) if sample in wanted]
        outside = [index for index, sample in enumerate(train.ids) if sample not in wanted]
        return train.select(inside), train.select(outside)


def load_data(spec: DataSpec, split: SplitManifest | None = None) -> LoadedData:
    """Read a data set and check it against its split; create the split if none is given.

    Args:
        spec: source, columns and split.
        split: the manifest of the model's training; None creates a new split.

    Returns:
        The rows, still encoded, with their split.

    Raises:
        UsageError: the source does not exist.
        DataError: the data cannot be read.
        IntegrityError: the data differ from the split manifest.
    """
    table = _read(spec, spec.source, train=True)
    if spec.brings_test_data:
        table = table.joined(_read(spec, spec.test_source or spec.source, train=False))
    if split is None:
        split = make_split(table, spec)
    split.check(table)
    return LoadedData(spec, table, split)


def _read(spec: DataSpec, source: str, train: bool) -> Table:
    spec = spec.model_copy(update={"source": source})
    if source in BUILTIN or source.startswith("torchvision:"):
        return read_table(spec, None, train)
    if not source.startswith("s3://"):
        return read_table(spec, Path(source), train)
    held = _Download()
    table = read_table(spec, _download(source, held.folder), train)
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
    parent, _, name = source.rstrip("/").rpartition("/")
    whole_bucket = parent in ("s3:/", "s3:")
    store, prefix = (open_store(source), "") if whole_bucket else (open_store(parent), name)
    keys = [entry.key for entry in store.list(prefix)]
    keys = [key for key in keys if whole_bucket or key == prefix or key.startswith(f"{prefix}/")]
    if not keys:
        raise DataError(
            f"there is no data at {source}", "no object has that prefix", "check the address in the data spec"
        )
    for key in keys:  # check all keys before the first write
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise DataError("a data object has an unsafe key", repr(key), "rename it")
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        store.download(key, folder / key)
    return folder / prefix
