"""Compares two models by the bits of their weight files, and two versions by what was done between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from salun_core.errors import UsageError
from salun_core.registry.lookup import Version, ancestry, read_file, read_version, resolve
from salun_core.registry.manifest import weight_files
from salun_core.registry.versions import check_not_purged
from salun_core.storage import FileStore, open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.delta import BLOCK, Raw, TensorFile
from salun_core.storage.local_files import list_tree

_FLOATS: Mapping[str, type[np.floating[Any]]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class LayerDifference:
    """How the weights of one layer differ.

    Args:
        name: the layer: the name of its tensors without the last part.
        values: how many weights and buffer values it has.
        changed: how many have other bits.
        distance: norm of the difference over the norm of the weights in A; None if they are not floats, or all 0.
    """

    name: str
    values: int
    changed: int
    distance: float | None


@dataclass(frozen=True)
class Step:
    """A version that only one of the two has in its ancestry.

    Args:
        side: which one.
        version: the version.
        requests: ids of the requests that its run erased.
        metrics: what was measured before and after it, from its evidence.
    """

    side: Literal["a", "b"]
    version: Version
    requests: Sequence[str]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ModelDifference:
    """How two models differ.

    Args:
        a: name of the first one.
        b: name of the second one.
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
class _Side:
    """A model to compare: its name, its weight files by name, and its line and digest if it is a version."""

    name: str
    files: Mapping[str, Path]
    version: tuple[str, str] | None = None


def compare(store_uri: str | None, a: str, b: str, requests_of: Callable[[str], Sequence[str]]) -> ModelDifference:
    """Compare two models.

    Args:
        store_uri: the store of versions; None if both are folders.
        a: `line`, `line@version`, or a model folder.
        b: the same.
        requests_of: returns the ids of the requests that a run erased.

    Raises:
        UsageError: one of them does not exist or has no weights (any more), or a store is needed.
        IntegrityError: a weight file is damaged.
        StoreError: the store is unreachable, or the disk is full.
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
        with TensorFile(a[name]) as old, TensorFile(b[name]) as fresh:
            for tensor, span in fresh.spans.items():
                if not span.like(old.spans.get(tensor)):
                    new.append(prefix + tensor)
                    continue
                sums = layers.setdefault(prefix + (tensor.rpartition(".")[0] or tensor), [0, 0, 0.0, 0.0])
                for part, value in enumerate(_tensor_sums(old, fresh, tensor)):
                    sums[part] += value
            gone += [prefix + t for t, span in old.spans.items() if not span.like(fresh.spans.get(t))]
    rows = [
        LayerDifference(layer, int(count), int(changed), _ratio(moved, norm))
        for layer, (count, changed, moved, norm) in layers.items()
    ]
    return rows, gone, new


def _ratio(moved: float, norm: float) -> float | None:
    ratio = float(np.sqrt(moved / norm)) if norm > 0 else float("nan")
    return ratio if np.isfinite(ratio) else None


def _tensor_sums(old: TensorFile, new: TensorFile, name: str) -> tuple[int, int, float, float]:
    """Return the number of elements, of those that differ, and the squared norms of the difference and of the old."""
    changed, moved, norm = 0, 0.0, 0.0
    kind = _FLOATS.get(new.spans[name].dtype)
    for before, after in _pairs(old, new, name):
        changed += int(np.count_nonzero(before != after))
        if kind is not None:
            first, second = before.view(kind).astype(np.float64), after.view(kind).astype(np.float64)
            moved += float(np.square(second - first).sum())
            norm += float(np.square(first).sum())
    return new.spans[name].elements, changed, moved, norm


def _pairs(old: TensorFile, new: TensorFile, name: str) -> Iterator[tuple[Raw, Raw]]:
    span = new.spans[name]
    for start in range(0, span.elements, BLOCK):
        count = min(BLOCK, span.elements - start)
        yield old.read(name, span.width, start, count), new.read(name, span.width, start, count)


def _steps(store: FileStore, line: str, a: str, b: str, requests_of: Callable[[str], Sequence[str]]) -> list[Step]:
    """Return what only one of two versions of a line has in its ancestry, the oldest first."""
    first, second = ancestry(store, line, a), ancestry(store, line, b)
    common = {item.digest for item in first} & {item.digest for item in second}

    def step(side: Literal["a", "b"], item: Version) -> Step:
        run = item.manifest.run
        return Step(side, item, requests_of(run) if run else [], _metrics(store, item))

    found = [step("a", item) for item in first if item.digest not in common]
    found += [step("b", item) for item in second if item.digest not in common]
    return sorted(found, key=lambda step: step.version.manifest.created_at)


def _metrics(store: FileStore, item: Version) -> dict[str, Any]:
    """Return the metrics in the evidence of a version; empty if it was not unlearned."""
    if "evidence.json" not in item.manifest.files:
        return {}
    metrics: dict[str, Any] = json.loads(read_file(store, item, "evidence.json"))["metrics"]
    return metrics
