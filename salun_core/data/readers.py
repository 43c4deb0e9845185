"""Reads a source by what it is: a name, a folder of class folders, Tiny-ImageNet, parquet."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from salun_core.data.folders import is_tiny_imagenet, read_folder, read_tiny_imagenet
from salun_core.data.parquet import read_parquet, subjects_of
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.data.torchvision_sets import CLASSES, fashion_mnist, read_torchvision
from salun_core.errors import UsageError


def read_digits(spec: DataSpec, train: bool) -> Table:
    """Read scikit-learn's digits: 1,797 real handwritten digits of 8 x 8 pixels, shipped with the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 15.9375).astype(np.uint8)[..., None]
    ids, subjects = [f"{index:06d}" for index in range(len(pixels))], subjects_of(spec)
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


HELD_OUT = ("test", "validation", "valid", "val")
_SPLIT_FOLDER = re.compile(f"(train|{'|'.join(HELD_OUT)})")
_SPLIT_FILE = re.compile(_SPLIT_FOLDER.pattern + r"(-\d{5}-of-\d{5}[^.]*)?\.parquet")
_BY_NAME = {"digits": read_digits, "fashion-mnist": read_fashion_mnist}


def read_table(spec: DataSpec, source: Path | None, train: bool) -> Table:
    """Read the rows of a source.

    Args:
        spec: column names and classes.
        source: a local folder or file; None for names.
        train: which part, for sources that have their own split.

    Returns:
        The rows, images still encoded; those of a folder that is split into train and test know their part.

    Raises:
        UsageError: nothing is there.
        DataError: what is there cannot be read.
    """
    if source is None:
        return _BY_NAME.get(spec.source, read_torchvision)(spec, train)
    if not source.exists():
        raise UsageError(f"there is no data at {source}", "the path does not exist", "check `source` in the data spec")
    if source.is_dir() and is_tiny_imagenet(source):
        return read_tiny_imagenet(spec, source)
    own = _own_split(source) if source.is_dir() and spec.test_source is None else None
    if own:
        return _read_part(spec, source, own[0]).joined(_read_part(spec, source, own[1]))
    parquet = source.suffix == ".parquet" or (source.is_dir() and any(source.glob("*.parquet")))
    return read_parquet(spec, source) if parquet else read_folder(spec, source)


def _own_split(folder: Path) -> tuple[list[Path], list[Path]] | None:
    """Return what of a folder is training data and what is test data, if every name in it says so."""
    names = {path: _SPLIT_FILE.fullmatch(path.name) for path in sorted(folder.glob("*.parquet"))}
    if not names:
        folders = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        names = {path: _SPLIT_FOLDER.fullmatch(path.name) for path in folders}
    groups: dict[str, list[Path]] = {}
    for path, match in names.items():
        groups.setdefault(match[1] if match else "", []).append(path)
    test = next((groups[name] for name in HELD_OUT if name in groups), None)
    return (groups["train"], test) if test and "train" in groups and "" not in groups else None


def _read_part(spec: DataSpec, source: Path, paths: list[Path]) -> Table:
    if paths[0].is_file():
        return read_parquet(spec, source, paths)
    spec = spec.model_copy(update={"test_source": str(paths[0])})  # a part has no parts of its own
    return read_table(spec, paths[0], True)
