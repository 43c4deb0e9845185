"""Downloads a version into a folder of the user's, so that a second call continues a first one that was cut off.

Files arrive in a hidden working folder next to the destination, `.NAME.pull/DIGEST`. A file gets its name there only
after its digest was found to match. What happens at each point of failure:

- While a file is downloaded, after a lost connection, a full disk or a kill: the working folder stays. The next call
  keeps its whole files, deletes the rest, and downloads what is missing.
- After the last file: if the destination does not exist, it appears by one rename, complete. If it exists (empty, or
  with some of the files), the files are moved into it one by one, each of them whole. A kill in between leaves some in
  both folders; the next call goes on.
- Two calls at once, for one version or two: a lock on a file of the working folder admits one, and the other one ends
  in a ConflictError. The system releases the lock with the process. The winner deletes the working folder, so a process
  that locked the deleted file looks again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from salun_core.digest import sha256_file
from salun_core.errors import ConflictError, StoreUnreachableError, UsageError
from salun_core.registry.lookup import read_version
from salun_core.registry.manifest import FileEntry, VersionManifest
from salun_core.registry.versions import check_not_purged
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.keys import check_relative_name
from salun_core.storage.local_files import disk_error, list_tree
from salun_core.storage.objects import FileStore

_SHOWN = 5
AGAIN = "run the same command again: it continues where it stopped"


@dataclass(frozen=True)
class Pulled:
    """What a pull did: how many files it downloaded, how many were present already, and the size of all in bytes."""

    manifest: VersionManifest
    fetched: int
    present: int
    size: int


class _Meter:
    """Adds up the bytes of a download, of which several threads report parts, and passes the sum on."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self._total, self._report, self._lock = total, report, threading.Lock()
        self._whole = self._part = self._limit = 0

    def begin(self, size: int) -> None:
        """A file of this many bytes follows."""
        with self._lock:
            self._whole, self._part, self._limit = self._whole + self._limit, 0, size
            self._report(self._whole, self._total)

    def __call__(self, count: int) -> None:
        with self._lock:
            self._part += count
            self._report(self._whole + min(self._part, self._limit), self._total)


def pull(
    store: FileStore,
    line: str,
    digest: str,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pulled:
    """Download the files of a version that a folder lacks, so that it holds exactly the files of the version.

    The folder must not exist, be empty, or hold unchanged files of this version only (UsageError). ConflictError if
    another process downloads into it. After a StoreError the next call continues. `on_progress` gets the bytes that
    arrived and those of all files to download.
    """
    manifest = read_version(store, line, digest)
    out = Path(os.path.abspath(out))
    size = sum(entry.size for entry in manifest.files.values())
    try:
        if not _missing(out, manifest, line, digest):
            return Pulled(manifest, 0, len(manifest.files), size)
        check_not_purged(store, line, digest)
        with _locked(out.with_name(f".{out.name[:100]}.pull"), out) as work:
            missing = _missing(out, manifest, line, digest)  # another call may have ended meanwhile
            files = work / digest[:12]
            files.mkdir(exist_ok=True)
            absent = [name for name in missing if not _is_right(files / name, manifest.files[name])]
            _clean(files, {*missing} - {*absent})
            _fetch(store, manifest, absent, files, on_progress)
            _place(files, out, missing)
            shutil.rmtree(work, ignore_errors=True)
    except StoreUnreachableError as error:
        raise StoreUnreachableError(error.what, error.why, f"{AGAIN}; {error.remedy}") from error
    except OSError as error:
        raise disk_error(f"cannot fetch {line}@{digest[:12]}", out, error) from error
    return Pulled(manifest, len(absent), len(manifest.files) - len(absent), size)


def _is_right(path: Path, entry: FileEntry) -> bool:
    plain = path.is_file() and not path.is_symlink()
    return plain and path.stat().st_size == entry.size and sha256_file(path) == entry.sha256


def _missing(out: Path, manifest: VersionManifest, line: str, digest: str) -> list[str]:
    """Return the files of a version that a folder lacks; refuse a folder with anything else in it."""
    if not os.path.lexists(out):
        return list(manifest.files)
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder", "a file has that name", "choose another folder")
    found = list_tree(out)
    other = [*found.strange, *sorted(found.files - manifest.files.keys())]
    there = found.files & manifest.files.keys()
    changed = sorted(name for name in there if not _is_right(out / name, manifest.files[name]))
    if other or changed:
        faults = [f"{name!r} is not one of its files" for name in other] + [f"{name} differs" for name in changed]
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UsageError(
            f"{out} holds other files than {line}@{digest[:12]}",
            "; ".join(faults[:_SHOWN]) + more,
            "choose another folder",
        )
    return [name for name in manifest.files if name not in there]


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[Path]:
    """Create the working folder and hold its lock."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = (work / "lock").open("w")
        except FileNotFoundError:  # the holder ended, and deleted the folder between the two lines
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(
                    f"cannot fetch into {out}",
                    "another command is fetching a version into it",
                    "wait until it ends, or choose another folder",
                ) from error
            try:
                current = (work / "lock").stat().st_ino == os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield work
                return


def _clean(files: Path, keep: set[str]) -> None:
    """Delete what a killed call left: everything but the files to keep."""
    for path in sorted(files.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(files).as_posix() not in keep:
            path.unlink()


def _fetch(
    store: FileStore,
    manifest: VersionManifest,
    names: list[str],
    files: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    meter = _Meter(sum(manifest.files[name].size for name in names), on_progress)
    for name in names:
        entry, path = manifest.files[name], files / check_relative_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        meter.begin(entry.size)
        fetch_blob(store, entry.sha256, path, entry.size, meter)
    meter.begin(0)


def _place(files: Path, out: Path, names: list[str]) -> None:
    """Move complete files to their destination, which appears by one rename if it does not exist."""
    if not os.path.lexists(out):
        files.rename(out)
        return
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).replace(out / name)
