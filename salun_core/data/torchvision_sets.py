"""Published data sets in their original files: torchvision's sets and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import operator
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from salun_core.data.spec import DataSpec
from salun_core.data.table import Table, check_labels
from salun_core.errors import DataError, unknown_name

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


_CLASSES = {"SVHN": [str(digit) for digit in range(10)]}  # of data sets whose class does not name them
_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError, LookupError, EOFError)


def read_torchvision(spec: DataSpec, train: bool) -> Table:
    """Read a torchvision data set that already lies under `root`; nothing is downloaded.

    Args:
        spec: its `source` names the data set, its `root` the folder.
        train: the training part, or the test part.

    Raises:
        UsageError: torchvision has no data set of that name.
        DataError: its files are not there or are damaged, or a label is no class.
    """
    import torchvision

    name = spec.source.removeprefix("torchvision:")
    if name not in torchvision.datasets.__all__:
        raise unknown_name("torchvision data set", name, torchvision.datasets.__all__)
    kind, root = getattr(torchvision.datasets, name), spec.root or "data"
    try:
        rows = kind() if name == "FakeData" else _open_torchvision_sets(kind, root, train)
        payloads, labels = _from_arrays(rows) or _one_by_one(rows)
    except (*_FAULTS, pickle.UnpicklingError) as error:
        raise DataError(f"cannot read torchvision's {name}", _why(error, root), _REMEDY) from error
    if not labels:
        raise DataError(f"torchvision's {name} is empty", f"it has no images under {root}", _REMEDY)
    classes = getattr(rows, "classes", None) or _CLASSES.get(name) or [str(label) for label in range(max(labels) + 1)]
    check_labels(labels, len(classes), f"torchvision's {name}")
    return Table(
        ids=[f"{index:06d}" for index in range(len(labels))],
        labels=labels,
        payloads=payloads,
        classes=[str(item) for item in classes],
        subjects=[None] * len(labels),
    )


_REMEDY = "put its files under `root`, as torchvision lays them out; none is downloaded"


def _why(error: Exception, root: str) -> str:
    why = str(error).split("\n")[0]
    if "download=True" in why:  # advice that cannot be followed here
        return f"its files are not all in {root}, or one has another checksum than torchvision knows"
    return why


def _open_torchvision_sets(kind: Callable[..., Any], root: str, train: bool) -> Any:  # noqa: ANN401 - torchvision has no types
    try:
        return kind(root, train=train, download=False)
    except TypeError:
        return kind(root, split="train" if train else "test")


def _one_by_one(rows: Any) -> tuple[Sequence[np.ndarray], list[int]]:  # noqa: ANN401
    pairs = [rows[index] for index in range(len(rows))]
    return [_pixels(image) for image, _ in pairs], [operator.index(label) for _, label in pairs]


def _pixels(image: Any) -> np.ndarray:  # noqa: ANN401 - a PIL image
    array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"), dtype=np.uint8)
    return array if array.ndim == 3 else array[..., None]


def _from_arrays(rows: Any) -> tuple[Sequence[np.ndarray], list[int]] | None:  # noqa: ANN401
    """Take all images and labels at once, where the data set keeps them in arrays that agree with its rows."""
    data, targets = getattr(rows, "data", None), getattr(rows, "targets", getattr(rows, "labels", None))
    if data is None or targets is None or not len(rows):
        return None
    images, labels = np.asarray(data), np.asarray(targets)
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.shape != (len(rows),):
        return None
    for pixels in _layouts(images):
        if len(pixels) == len(rows) and _agree(rows, pixels, labels):
            return list(pixels), [int(label) for label in labels]
    return None


def _layouts(images: np.ndarray) -> list[np.ndarray]:
    """Return the ways to see images as [N, H, W, C]: grey, channels last, channels first."""
    if images.ndim == 3:
        return [images[..., None]]
    return [images, images.transpose(0, 2, 3, 1)] if images.ndim == 4 else []


def _agree(rows: Any, pixels: np.ndarray, labels: np.ndarray) -> bool:  # noqa: ANN401
    for index in {0, len(rows) // 2, len(rows) - 1}:
        image, label = rows[index]
        if label != labels[index] or not np.array_equal(_pixels(image), pixels[index]):
            return False
    return True
