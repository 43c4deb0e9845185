"""Selects the reader of a source: a name, a folder of class folders, Tiny-ImageNet, parquet, WebDataset archives."""

from __future__ import annotations

import re
from pathlib import Path

from salun_core.data.archives import read_archives
from salun_core.data.folders import is_tiny_imagenet, read_folder, read_tiny_imagenet
from salun_core.data.parquet import is_saved, read_parquet, read_saved
from salun_core.data.published import read_digits, read_fashion_mnist, read_torchvision
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.errors import UsageError

HELD_OUT = ("test", "validation", "valid", "val")  # names of the test part, in order of preference
_SPLIT_FOLDER = re.compile(f"(train|{'|'.join(HELD_OUT)})")
_SPLIT_FILE = re.compile(_SPLIT_FOLDER.pattern + r"(-\d{5}-of-\d{5}[^.]*)?\.parquet")  # shards as the hub names them
_BY_NAME = {"digits": read_digits, "fashion-mnist": read_fashion_mnist}


def read_table(spec: DataSpec, source: Path | None, train: bool) -> Table:
    """Read the rows of a source, with encoded images; rows of a folder with its own split carry their part.

    `source` is None for a source that `spec` names. `train` selects the part of sources with their own split.
    """
    if source is None:
        return _BY_NAME.get(spec.source, read_torchvision)(spec, train)
    if not source.exists():
        raise UsageError(f"there is no data at {source}", "the path does not exist", "check `source` in the data spec")
    if source.is_dir() and is_tiny_imagenet(source):
        return read_tiny_imagenet(spec, source)
    if source.is_dir() and is_saved(source):
        return read_saved(spec, source)
    parts = _own_split(source) if source.is_dir() and spec.test_source is None else None
    if parts:
        return _read_part(spec, source, parts[0]).joined(_read_part(spec, source, parts[1]))
    for ending, reader in ((".parquet", read_parquet), (".tar", read_archives)):
        if source.suffix == ending or (source.is_dir() and any(source.glob(f"*{ending}"))):
            return reader(spec, source)
    return read_folder(spec, source)


def _own_split(folder: Path) -> tuple[list[Path], list[Path]] | None:
    """Return the training and test data of a folder, if every name in it belongs to a split."""
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
    spec = spec.model_copy(update={"test_source": str(paths[0])})  # avoids splitting the part again
    return read_table(spec, paths[0], True)
