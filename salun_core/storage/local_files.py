"""Files on the local disk: atomic writes, folder listings, and their errors."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from salun_core.errors import StoreError
from salun_core.storage.keys import MAX_SEGMENTS

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_error(what: str, path: Path, error: OSError) -> StoreError:
    """Build the error for a local file that cannot be read or written."""
    full = error.errno in _FULL
    remedy = "free some space there, or choose another folder" if full else "check the path and its permissions"
    return StoreError(what, f"{path}: {error.strerror or type(error).__name__}", remedy)


@contextmanager
def temporary_files(
    what: str, remedy: str = "free some space there, or set TMPDIR to a folder on a larger disk"
) -> Iterator[None]:
    """Report a full or broken disk of temporary files while the block runs, as StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(what, f"{tempfile.gettempdir()}: {error.strerror or error}", remedy) from error


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a new folder for temporary files, which is deleted afterwards.

    If its disk is full, the StoreError names the variable that moves temporary files.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        try:
            yield Path(name)
        except (OSError, StoreError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            outside = isinstance(error, StoreError) and name not in error.why
            if outside or not isinstance(cause, OSError) or cause.errno not in _FULL:
                raise
            raise StoreError(
                "cannot write temporary files",
                f"{tempfile.gettempdir()}: {cause.strerror}",
                "free some space there, or set TMPDIR to another folder",
            ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: it has its old content or the new one, also after a kill. Its folder is created."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except OSError as error:
        raise disk_error(f"cannot write {path.name}", path, error) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Tree:
    """The content of a folder.

    Args:
        files: plain files, by name relative to the folder, with `/` between folders.
        strange: names of links, devices, pipes, and folders that are empty or too deep, sorted.
    """

    files: frozenset[str]
    strange: tuple[str, ...]


def list_tree(folder: Path) -> Tree:
    """List a folder and all folders in it, without following links.

    An empty folder is strange, because no manifest could name it. So is a folder too deep for a file of a version; it
    is not read.
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
