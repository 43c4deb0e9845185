"""Loads a data set and checks it against its split manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from salun_core.data.decode import decode
from salun_core.data.forget_set import ForgetSet
from salun_core.data.images import ImageSet, Normalisation
from salun_core.data.readers import read_table
from salun_core.data.spec import BUILTIN, DataSpec
from salun_core.data.split import SplitManifest, SplitName, make_split
from salun_core.data.table import Table
from salun_core.digest import check_digest
from salun_core.errors import DataError
from salun_core.storage import open_store


@dataclass(frozen=True)
class LoadedData:
    """A data set whose rows were checked against its split manifest."""

    spec: DataSpec
    table: Table
    split: SplitManifest

    def images(self, name: SplitName, normalisation: Normalisation | None = None) -> ImageSet:
        """Decode one split.

        Args:
            name: train, validation or test.
            normalisation: normalisation of the model; None computes it from this split.

        Returns:
            The images in the order of `SplitManifest.ids`.

        Raises:
            DataError: an image is corrupt, or sizes differ.
        """
        ids = self.split.ids(name)
        images = self.pixels(ids)
        labels = [self.table.labels[self.table.position[sample]] for sample in ids]
        scale = normalisation or Normalisation.of(images)
        return ImageSet(images, torch.tensor(labels, dtype=torch.int64), scale, self.spec.augment, ids)

    def pixels(self, ids: Sequence[str]) -> Tensor:
        """Decode samples by id, in the given order, to uint8 [N, C, H, W].

        Raises:
            DataError: an image is corrupt, or sizes differ.
        """
        payloads = [self.table.payloads[self.table.position[sample]] for sample in ids]
        return decode(payloads, ids, self.spec.size, self.spec.channels)

    def forget_and_retain(self, train: ImageSet, forget: ForgetSet) -> tuple[ImageSet, ImageSet]:
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
    with _local(source) as path:
        return read_table(spec, path, train)


@contextmanager
def _local(source: str) -> Iterator[Path]:
    """Yield a local path of a source; S3 data are downloaded for the duration of the block."""
    if not source.startswith("s3://"):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="salun-data-") as folder:
        yield _download(source, Path(folder))


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
