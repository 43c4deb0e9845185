"""What `salun doctor` looks at: is everything here that a run needs?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from salun_core.config import Document
from salun_core.errors import SalunError
from salun_core.telemetry.push import URL_VARIABLE

OLDEST_PYTHON = (3, 11)
NEEDED_DISK_BYTES = 2 * 1024**3
_NEEDED = ("torch", "torchvision", "timm", "safetensors", "scikit-learn", "boto3", "pyarrow", "matplotlib")
_TIMEOUT_SECONDS = 3.0

State = Literal["ok", "absent", "failed"]


class Check(Document):
    """One thing that was looked at.

    Args:
        name: of the thing.
        state: `absent` where it is not needed and not there; `failed` where a run would fail.
        detail: what was found.
        remedy: what to do about it.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def run_checks(store_uri: str | None, folder: Path) -> Iterator[Check]:
    """Look at this machine, and at what the environment names.

    Args:
        store_uri: the store to put to the test; it is written to, below a key of its own that is deleted again.
        folder: where runs would write.

    Yields:
        One check after the other.
    """
    yield _python()
    yield from (_package(name, needed=True) for name in _NEEDED)
    yield _device()
    yield _threads()
    yield _disk(folder)
    yield _package("kfp", needed=False, remedy="pip install 'salun[kfp]' to compile and run pipelines")
    yield _embedded()
    yield _container_engine()
    yield _store(store_uri)
    yield _gateway()


def _python() -> Check:
    ok = sys.version_info >= OLDEST_PYTHON
    return Check(
        name="python",
        state="ok" if ok else "failed",
        detail=platform.python_version(),
        remedy="" if ok else "install Python 3.11 or newer",
    )


def _package(name: str, needed: bool, remedy: str = "pip install salun") -> Check:
    try:
        return Check(name=name, state="ok", detail=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, state="failed" if needed else "absent", detail="not installed", remedy=remedy)


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # a wheel for another processor or CUDA
        return Check(name="device", state="failed", detail=_line(error), remedy="install torch for this machine")
    if not torch.cuda.is_available():
        return Check(name="device", state="ok", detail="cpu")
    memory = torch.cuda.get_device_properties(0).total_memory / 1024**3
    return Check(name="device", state="ok", detail=f"{torch.cuda.get_device_name()}, {memory:.0f} GiB")


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    return Check(name="threads", state="ok", detail=f"{cores} cores" + (f", OMP_NUM_THREADS={limit}" if limit else ""))


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    ok = free >= NEEDED_DISK_BYTES
    return Check(
        name="disk",
        state="ok" if ok else "failed",
        detail=f"{free / 1024**3:.1f} GiB free",
        remedy="" if ok else "free some space: a run wants 2 GiB",
    )


def _embedded() -> Check:
    from salun_core.storage.seaweedfs import find_binary

    try:
        return Check(name="embedded S3", state="ok", detail=find_binary().name)
    except SalunError as error:
        return Check(name="embedded S3", state="absent", detail="not installed", remedy=error.remedy)


def _container_engine() -> Check:
    found = [name for name in ("docker", "podman") if shutil.which(name)]
    return Check(
        name="container engine",
        state="ok" if found else "absent",
        detail=", ".join(found) or "not installed",
        remedy="" if found else "install docker or podman to build the image",
    )


def _store(uri: str | None) -> Check:
    if not uri:
        return Check(name="store", state="absent", detail="none named", remedy="give --store s3://bucket/prefix")
    from salun_core.storage import open_store
    from salun_core.storage.probe import require_safe

    try:
        report = require_safe(open_store(uri))
    except SalunError as error:
        return Check(name="store", state="failed", detail=f"{error.what}: {error.why}", remedy=error.remedy)
    return Check(name="store", state="ok", detail=f"{report.uri} keeps all {len(report.checks)} promises")


def _gateway() -> Check:
    url = os.environ.get(URL_VARIABLE, "").strip()
    if not url:
        return Check(name="pushgateway", state="absent", detail="none named", remedy=f"set {URL_VARIABLE} for metrics")
    remedy = f"correct {URL_VARIABLE}; a run goes on without its metrics"
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        socket.create_connection(place, _TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        return Check(name="pushgateway", state="failed", detail=_line(error), remedy=remedy)
    return Check(name="pushgateway", state="ok", detail=f"{place[0]}:{place[1]} answers")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
