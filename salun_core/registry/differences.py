"""Compares two models by the bits of their weight files, and two versions by what was done between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from salun_core.errors import IntegrityError, UsageError
from salun_core.registry.lookup import Version, ancestry, read_file, read_version, resolve
from salun_core.registry.manifest import weight_files
from salun_core.registry.versions import check_not_purged
from salun_core.storage import ObjectStore, open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.local_files import list_tree

_FLOATS: Mapping[str, type[np.floating[Any]]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_WIDTHS = {  # bytes of an element; others are compared byte by byte
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
}
_BLOCK = 1 << 20  # elements that are compared at once


@dataclass(frozen=True)
class LayerDifference:
    """How the weights of one layer differ.

    Args:
        name: the layer: the name of its tensors without the last part.
        changed: how many have other bits.
        distance: norm of the difference over the norm of the weights in A; None if they are not floats, or all 0.
    """

    name: str
    values: int
    changed: int
    distance: float | None


@dataclass(frozen=True)
class Step:
    """A version that only one of the two has in its ancestry, with the ids of the requests that its run erased."""

    side: Literal["a", "b"]
    version: Version
    requests: Sequence[str]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ModelDifference:
    """How two models differ.

    Args:
        layers: all layers that both have, in the order of the files.
        gone: tensors that only A has, or of another type or shape.
        new: tensors that only B has, or of another type or shape.
        steps: the versions between them, the oldest first; empty if one is a folder.
    """

    a: str
    b: str
    layers: Sequence[LayerDifference]
    gone: Sequence[str]
    new: Sequence[str]
    steps: Sequence[Step] = field(default=())

    @property
    def values(self) -> int:
        """Weights and buffer values of the layers that both have."""
        return sum(item.values for item in self.layers)

    @property
    def changed(self) -> int:
        """How many of them have other bits."""
        return sum(item.changed for item in self.layers)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file: type, shape, and its elements as unsigned integers, so that NaNs and signed zeros count."""

    dtype: str
    shape: Sequence[int]
    bits: NDArray[np.unsignedinteger]

    def like(self, other: _Tensor | None) -> bool:
        """Return whether another tensor has the same type and shape."""
        return other is not None and (self.dtype, self.shape) == (other.dtype, other.shape)


@dataclass(frozen=True)
class _Side:
    """A model to compare: its name, its weight files by name, and its line and digest if it is a version."""

    name: str
    files: Mapping[str, Path]
    version: tuple[str, str] | None = None


def compare(store_uri: str | None, a: str, b: str, requests_of: Callable[[str], Sequence[str]]) -> ModelDifference:
    """Compare two models, each a `line`, a `line@version` or a model folder; the store may be None for two folders.

    UsageError if one of them does not exist or its weights were purged. `requests_of` returns what a run erased.
    """
    with tempfile.TemporaryDirectory(prefix="salun-diff-") as folder:
        sides = [_side(store_uri, text, Path(folder) / name) for text, name in ((a, "a"), (b, "b"))]
        layers, gone, new = _compare_files(sides[0].files, sides[1].files)
    steps: Sequence[Step] = ()
    first, second = (side.version for side in sides)
    if store_uri and first and second and first[0] == second[0]:
        steps = _steps(open_store(store_uri), first[0], first[1], second[1], requests_of)
    return ModelDifference(sides[0].name, sides[1].name, layers, gone, new, steps)


def _side(store_uri: str | None, text: str, folder: Path) -> _Side:
    local = Path(text)
    if local.is_dir():
        names = weight_files(list_tree(local).files)
        if not names:
            raise UsageError(f"{text} has no weights", "it holds no safetensors file", "give a model folder")
        return _Side(text, {name: local / name for name in names})
    if not store_uri:
        raise UsageError(
            f"{text!r} is not a folder", "a version needs a store, and none is given", "give --store, or a model folder"
        )
    store = open_store(store_uri)
    line, digest = resolve(store, text)
    check_not_purged(store, line, digest)
    manifest, files = read_version(store, line, digest), {}
    for name in weight_files(manifest.files):
        files[name] = folder / name
        files[name].parent.mkdir(parents=True, exist_ok=True)
        fetch_blob(store, manifest.files[name].sha256, files[name], manifest.files[name].size)
    return _Side(f"{line}@{digest[:12]}", files, (line, digest))


def _compare_files(a: Mapping[str, Path], b: Mapping[str, Path]) -> tuple[list[LayerDifference], list[str], list[str]]:
    layers: dict[str, list[float]] = {}
    gone: list[str] = []
    new: list[str] = []
    for name in sorted({*a, *b}):
        prefix = "" if "/" not in name else f"{name.rpartition('/')[0]}:"
        if name not in a or name not in b:
            (gone if name in a else new).append(name)
            continue
        old, fresh = _read_tensors(a[name]), _read_tensors(b[name])
        for tensor, found in fresh.items():
            before = old.get(tensor)
            if before is None or not found.like(before):
                new.append(prefix + tensor)
                continue
            sums = layers.setdefault(prefix + (tensor.rpartition(".")[0] or tensor), [0, 0, 0.0, 0.0])
            for part, value in enumerate(_tensor_sums(before, found)):
                sums[part] += value
        gone += [prefix + tensor for tensor, found in old.items() if not found.like(fresh.get(tensor))]
    rows = [
        LayerDifference(layer, int(count), int(changed), _ratio(moved, norm))
        for layer, (count, changed, moved, norm) in layers.items()
    ]
    return rows, gone, new


def _read_tensors(path: Path) -> dict[str, _Tensor]:
    """Return the tensors of a safetensors file in the order of their bytes, which are mapped and not read.

    numpy has no types for some of them, such as BF16, so `safe_open` only checks that header and size fit.
    """
    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, ValueError) as error:
        raise IntegrityError(f"weight file {path.name} is damaged", str(error), "restore it from a copy") from error
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        bits = data[start + first : start + end].view(f"<u{_WIDTHS.get(entry['dtype'], 1)}")
        found[name] = _Tensor(entry["dtype"], entry["shape"], bits)
    return found


def _ratio(moved: float, norm: float) -> float | None:
    ratio = float(np.sqrt(moved / norm)) if norm > 0 else float("nan")
    return ratio if np.isfinite(ratio) else None


def _tensor_sums(old: _Tensor, new: _Tensor) -> tuple[int, int, float, float]:
    """Return the number of elements, of those that differ, and the squared norms of the difference and of the old."""
    changed, moved, norm = 0, 0.0, 0.0
    kind = _FLOATS.get(new.dtype)
    for start in range(0, new.bits.size, _BLOCK):
        before, after = (tensor.bits[start : start + _BLOCK] for tensor in (old, new))
        changed += int(np.count_nonzero(before != after))
        if kind is not None:
            first, second = before.view(kind).astype(np.float64), after.view(kind).astype(np.float64)
            moved += float(np.square(second - first).sum())
            norm += float(np.square(first).sum())
    return new.bits.size, changed, moved, norm


def _steps(store: ObjectStore, line: str, a: str, b: str, requests_of: Callable[[str], Sequence[str]]) -> list[Step]:
    """Return what only one of two versions of a line has in its ancestry, the oldest first."""
    first, second = ancestry(store, line, a), ancestry(store, line, b)
    common = {item.digest for item in first} & {item.digest for item in second}

    def step(side: Literal["a", "b"], item: Version) -> Step:
        run = item.manifest.run
        return Step(side, item, requests_of(run) if run else [], _metrics(store, item))

    found = [step("a", item) for item in first if item.digest not in common]
    found += [step("b", item) for item in second if item.digest not in common]
    return sorted(found, key=lambda step: step.version.manifest.created_at)


def _metrics(store: ObjectStore, item: Version) -> dict[str, Any]:
    """Return the metrics in the evidence of a version; empty if it was not unlearned."""
    if "evidence.json" not in item.manifest.files:
        return {}
    metrics: dict[str, Any] = json.loads(read_file(store, item, "evidence.json"))["metrics"]
    return metrics
