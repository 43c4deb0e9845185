"""Lists a model's folder as it lies on the disk: files by relative name, and all that is no plain file apart."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from salun_core.storage.names import MAX_SEGMENTS


@dataclass(frozen=True)
class Tree:
    """What a folder holds.

    Args:
        files: plain files, by name relative to the folder, with `/` between folders.
        strange: names of links, devices, pipes, and folders that are empty or too deep, sorted.
    """

    files: frozenset[str]
    strange: tuple[str, ...]


def list_tree(folder: Path) -> Tree:
    """List a folder and all folders in it; no link is followed.

    An empty folder is strange: no model version needs one, and nothing in a version's manifest would name it. So is
    one too deep for any file of a version; it is not read.

    Args:
        folder: the folder.

    Raises:
        OSError: it, or a folder in it, cannot be read.
    """
    files: set[str] = set()
    strange: list[str] = []
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(folder / inside) as entries:
            found = [(inside + entry.name, entry) for entry in entries]
        if inside and not found:
            strange.append(inside)
        for name, entry in found:
            if entry.is_file(follow_symlinks=False):
                files.add(name)
            elif entry.is_dir(follow_symlinks=False) and name.count("/") < MAX_SEGMENTS - 1:
                waiting.append(f"{name}/")
            else:
                strange.append(name)
    return Tree(frozenset(files), tuple(sorted(strange)))
