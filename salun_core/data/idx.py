"""Fashion-MNIST in the idx files it is published in: looked for on this machine, and read strictly."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from salun_core.errors import DataError

DATASETS_VARIABLE = "SALUN_DATASETS"
HOMES = (Path(".salun/datasets"), Path("/usr/share/datasets"))  # where .ci/datasets and Debian's package put it
MAX_IDX_BYTES = 64 * 1024 * 1024
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_UNSIGNED_BYTE = 8
_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_GET_IT = "apt-get install dataset-fashion-mnist, or set `root` in the data spec to the folder of its four files"


def fashion_mnist(root: str | None, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read one part of Fashion-MNIST: 60,000 training or 10,000 test images of clothes (Xiao et al. 2017).

    Args:
        root: the folder of the files; None looks in `$SALUN_DATASETS/fashion-mnist`, then in `.salun/datasets` below
            the working directory, then where Debian's package puts them.
        train: which part.

    Returns:
        Images uint8 [N, height, width], and labels uint8 [N], below 10.

    Raises:
        DataError: the files are nowhere, or one of them is damaged.
    """
    files, (of_images, of_labels) = _files(root), _NAMES[:2] if train else _NAMES[2:]
    images, labels = read_idx(files[of_images], axes=3), read_idx(files[of_labels], axes=1)
    if len(images) != len(labels):
        raise _damaged(of_labels, f"{len(labels)} labels for {len(images)} images")
    if labels.max() >= len(CLASSES):
        raise _damaged(of_labels, f"label {labels.max()}, and there are {len(CLASSES)} classes")
    return images, labels


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an idx file of unsigned bytes: two zero bytes, the type, the number of axes, their lengths, the values.

    Args:
        path: the file; compressed if it ends in `.gz`, and never unpacked further than its header promises.
        axes: how many the array must have.

    Returns:
        The array, uint8, read-only.

    Raises:
        DataError: it is cut short, too long, too large, empty, or no such file.
    """
    try:
        if path.stat().st_size > MAX_IDX_BYTES:
            raise _damaged(path.name, f"it has over {MAX_IDX_BYTES} bytes")
        with _open(path) as file:
            return _parse(file, path.name, axes)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path.name, str(error)) from error


def _parse(file: IO[bytes], name: str, axes: int) -> np.ndarray:
    magic, lengths = file.read(4), file.read(4 * axes)
    if magic != bytes((0, 0, _UNSIGNED_BYTE, axes)):
        raise _damaged(name, f"it is no idx file of unsigned bytes with {axes} axes")
    if len(lengths) != 4 * axes:
        raise _damaged(name, "it ends within its header")
    shape = struct.unpack(f">{axes}I", lengths)
    size = math.prod(shape)
    if not 0 < size <= MAX_IDX_BYTES:
        raise _damaged(name, f"its header promises {size} bytes of values, and 1 to {MAX_IDX_BYTES} are read")
    values = file.read(size + 1)  # one more than promised: it must not be there, and gzip then compares its sum
    if len(values) != size:
        held = "more" if len(values) > size else f"only {len(values)}"
        raise _damaged(name, f"its header promises {size} bytes of values, and it holds {held}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _files(root: str | None) -> dict[str, Path]:
    """Return the four files by name, from the first folder that holds them all; unpacked ones come first."""
    variable = os.environ.get(DATASETS_VARIABLE, "").strip()
    homes = [Path(variable), *HOMES] if variable else HOMES
    folders = [Path(root)] if root is not None else [home / "fashion-mnist" for home in homes]
    for folder in folders:
        paths = {name: (folder / name, folder / f"{name}.gz") for name in _NAMES}
        found = {name: path for name, pair in paths.items() for path in reversed(pair) if path.is_file()}
        if len(found) == len(_NAMES):
            return found
    places = ", ".join(str(folder) for folder in folders)
    raise DataError(
        "there is no Fashion-MNIST", f"{', '.join(_NAMES)} (or .gz) are not all in one of {places}", _GET_IT
    )


def _damaged(name: str, why: str) -> DataError:
    return DataError(f"cannot read {name}", why, f"get it again: {_GET_IT}")
