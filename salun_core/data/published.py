"""Published data sets in their original files: scikit-learn's digits, Fashion-MNIST, torchvision's sets."""

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
from typing import Any

import numpy as np

from salun_core.data.parquet import subjects_of
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table, check_labels
from salun_core.errors import DataError, unknown_name

DATASETS_VARIABLE = "SALUN_DATASETS"
HOMES = (Path(".salun/datasets"), Path("/usr/share/datasets"))  # install paths of .ci/datasets and of Debian's package
MAX_IDX_BYTES = 64 * 1024 * 1024  # the largest file of Fashion-MNIST has 47 MB unpacked
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_UNSIGNED_BYTE = 8  # type code of the idx format
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_GET_IT = "apt-get install dataset-fashion-mnist, or set `root` in the data spec to the folder of its four files"


def read_digits(spec: DataSpec, train: bool) -> Table:
    """Read scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, shipped with the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 15.9375).astype(np.uint8)[..., None]  # 16 grey levels, spread over 0 to 255
    table = Table.numbered(list(pixels), digits.target.tolist(), [str(name) for name in digits.target_names])
    return table.with_subjects(subjects_of(spec))


def read_fashion_mnist(spec: DataSpec, train: bool) -> Table:
    """Read one part of Fashion-MNIST from its files on this machine; errors as for `fashion_mnist`."""
    images, labels = fashion_mnist(spec.root, train)
    return Table.numbered(list(images[..., None]), labels.tolist(), list(CLASSES))


def fashion_mnist(root: str | None, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read Fashion-MNIST (Xiao et al. 2017): images uint8 [N, height, width], and labels uint8 [N] below 10.

    The training part has 60,000 images of clothes, the test part 10,000. If `root` is None, it searches
    `$SALUN_DATASETS/fashion-mnist`, then `.salun/datasets` in the working directory, then the folder of Debian's
    package.
    """
    files = _fashion_mnist_files(root)
    image_file, label_file = _IDX_FILES[:2] if train else _IDX_FILES[2:]
    images, labels = read_idx(files[image_file], axes=3), read_idx(files[label_file], axes=1)
    if len(images) != len(labels):
        raise _damaged(label_file, f"{len(labels)} labels for {len(images)} images")
    if labels.max() >= len(CLASSES):
        raise _damaged(label_file, f"label {labels.max()}, and there are {len(CLASSES)} classes")
    return images, labels


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an idx file of unsigned bytes: two zero bytes, the type, the number of axes, their lengths, the values.

    torchvision's reader unpacks a whole file before it looks at the header, and checks with assertions. This one never
    unpacks more than the header declares. The array is read-only; files that end in `.gz` are compressed.
    """
    name = path.name
    try:
        if path.stat().st_size > MAX_IDX_BYTES:
            raise _damaged(name, f"it has over {MAX_IDX_BYTES} bytes")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic, lengths = file.read(4), file.read(4 * axes)
            if magic != bytes((0, 0, _UNSIGNED_BYTE, axes)):
                raise _damaged(name, f"it is not an idx file of unsigned bytes with {axes} axes")
            if len(lengths) != 4 * axes:
                raise _damaged(name, "it ends within its header")
            shape = struct.unpack(f">{axes}I", lengths)
            size = math.prod(shape)
            if not 0 < size <= MAX_IDX_BYTES:
                raise _damaged(name, f"its header declares {size} bytes of values; 1 to {MAX_IDX_BYTES} are supported")
            values = file.read(size + 1)  # one extra byte, which must not exist: gzip checks its CRC at the end
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(name, str(error)) from error
    if len(values) != size:
        found = "more" if len(values) > size else f"only {len(values)}"
        raise _damaged(name, f"its header declares {size} bytes of values, and it holds {found}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _fashion_mnist_files(root: str | None) -> dict[str, Path]:
    """Return the four files by name, from the first folder with all of them; uncompressed files are preferred."""
    variable = os.environ.get(DATASETS_VARIABLE, "").strip()
    homes = [Path(variable), *HOMES] if variable else HOMES
    folders = [Path(root)] if root is not None else [home / "fashion-mnist" for home in homes]
    for folder in folders:
        paths = {name: (folder / name, folder / f"{name}.gz") for name in _IDX_FILES}
        found = {name: path for name, pair in paths.items() for path in reversed(pair) if path.is_file()}
        if len(found) == len(_IDX_FILES):
            return found
    places = ", ".join(map(str, folders))
    raise DataError(
        "Fashion-MNIST was not found", f"{', '.join(_IDX_FILES)} (or .gz) are not all in one of {places}", _GET_IT
    )


def _damaged(name: str, why: str) -> DataError:
    return DataError(f"cannot read {name}", why, f"get it again: {_GET_IT}")


_CLASSES = {"SVHN": [str(digit) for digit in range(10)]}  # for data sets without a list of class names
_FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, ImportError, OSError, LookupError, EOFError)
_REMEDY = "put its files under `root`, as torchvision lays them out; nothing is downloaded"


def read_torchvision(spec: DataSpec, train: bool) -> Table:
    """Read a torchvision data set from its files under `root` of the spec; nothing is downloaded."""
    import torchvision

    name = spec.source.removeprefix("torchvision:")
    if name not in torchvision.datasets.__all__:
        raise unknown_name("torchvision data set", name, torchvision.datasets.__all__)
    kind, root = getattr(torchvision.datasets, name), spec.root or "data"
    try:
        rows = kind() if name == "FakeData" else _open(kind, root, train)
        payloads, labels = _from_arrays(rows) or _from_rows(rows)
    except (*_FAULTS, pickle.UnpicklingError) as error:
        why = str(error).split("\n")[0]
        if "download=True" in why:  # torchvision's advice, which does not apply here
            why = f"its files are not all in {root}, or one has another checksum than torchvision expects"
        raise DataError(f"cannot read torchvision's {name}", why, _REMEDY) from error
    if not labels:
        raise DataError(f"torchvision's {name} is empty", f"it has no images under {root}", _REMEDY)
    classes = getattr(rows, "classes", None) or _CLASSES.get(name) or range(max(labels) + 1)
    check_labels(labels, len(classes), f"torchvision's {name}")
    return Table.numbered(payloads, labels, [str(item) for item in classes])


def _open(kind: Callable[..., Any], root: str, train: bool) -> Any:  # noqa: ANN401 - torchvision has no types
    try:
        return kind(root, train=train, download=False)
    except TypeError:
        return kind(root, split="train" if train else "test")


def _from_arrays(rows: Any) -> tuple[Sequence[np.ndarray], list[int]] | None:  # noqa: ANN401
    """Return all images and labels if the data set holds them in arrays, None otherwise.

    These array names are not a public interface, so three rows are compared with the data set's own items.
    """
    data, targets = getattr(rows, "data", None), getattr(rows, "targets", getattr(rows, "labels", None))
    if data is None or targets is None or not len(rows):
        return None
    images, labels = np.asarray(data), np.asarray(targets)
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.shape != (len(rows),):
        return None
    layouts = []  # as [N, H, W, C]
    if images.ndim == 3:
        layouts = [images[..., None]]
    elif images.ndim == 4:  # channels last or channels first
        layouts = [images, images.transpose(0, 2, 3, 1)]
    for pixels in layouts:
        if len(pixels) == len(rows) and _agree(rows, pixels, labels):
            return list(pixels), labels.tolist()
    return None


def _agree(rows: Any, pixels: np.ndarray, labels: np.ndarray) -> bool:  # noqa: ANN401
    for index in {0, len(rows) // 2, len(rows) - 1}:
        image, label = rows[index]
        if label != labels[index] or not np.array_equal(_pixels(image), pixels[index]):
            return False
    return True


def _from_rows(rows: Any) -> tuple[Sequence[np.ndarray], list[int]]:  # noqa: ANN401
    pairs = [rows[index] for index in range(len(rows))]
    return [_pixels(image) for image, _ in pairs], [operator.index(label) for _, label in pairs]


def _pixels(image: Any) -> np.ndarray:  # noqa: ANN401 - a PIL image
    array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"), dtype=np.uint8)
    return array if array.ndim == 3 else array[..., None]
