"""Files that take long to make and that all test workers share."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first worker fills, and that the others wait for.

    The marker is written after the files, under the lock. A worker that fails or is killed before that leaves no
    marker and gives up the lock with its file, so that the next one empties the folder and makes it again. Tests must
    not write into the folder: the other workers read it at the same time.

    Args:
        factory: pytest's fixture.
        name: of the folder, unique in a session.
        make: fills the empty folder that it gets.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own in that of the session
    folder, marker = base / name, base / f"{name}.made"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            marker.touch()
    return folder
