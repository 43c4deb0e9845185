"""Torchvision's data sets, from files on this machine: CIFAR-10, CIFAR-100, SVHN, MNIST and others."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from salun_core.data.spec import DataSpec
from salun_core.data.table import Table, check_labels
from salun_core.errors import DataError, unknown_name

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
        rows = kind() if name == "FakeData" else _open(kind, root, train)
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


def _open(kind: Callable[..., Any], root: str, train: bool) -> Any:  # noqa: ANN401 - torchvision has no types
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
