"""The checks of `salun doctor`: does this machine have everything that a run needs?"""

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

_PACKAGES = ("torch", "torchvision", "timm", "safetensors", "scikit-learn", "boto3", "pyarrow", "matplotlib")
_DISK_GIB = 2
_TIMEOUT_SECONDS = 3.0

State = Literal["ok", "absent", "failed"]


class Check(Document):
    """The result of one check.

    Args:
        name: what was checked.
        state: `absent` if it is optional and missing; `failed` if a run would fail.
        detail: what was found.
        remedy: how to fix it.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def run_checks(store_uri: str | None, folder: Path) -> Iterator[Check]:
    """Check this machine and what the environment names.

    Args:
        store_uri: the store to probe; the probe writes below a key of its own and deletes it again.
        folder: where runs would write.

    Yields:
        One check after the other.
    """
    old = sys.version_info < (3, 11)
    yield _check("python", not old, platform.python_version(), "install Python 3.11 or newer")
    yield from (_package(name) for name in _PACKAGES)
    yield _device()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    yield _check("threads", True, f"{cores} cores" + (f", OMP_NUM_THREADS={limit}" if limit else ""))
    free = shutil.disk_usage(folder).free / 1024**3
    yield _check("disk", free >= _DISK_GIB, f"{free:.1f} GiB free", f"free some space: a run needs {_DISK_GIB} GiB")
    yield _package("kfp", "pip install 'salun[kfp]' to compile and run pipelines", required=False)
    yield _embedded()
    engines = ", ".join(name for name in ("docker", "podman") if shutil.which(name))
    remedy = "install docker or podman to build the image"
    yield _check("container engine", bool(engines), engines or "not installed", remedy, required=False)
    yield _store(store_uri)
    yield _gateway()


def _check(name: str, ok: bool, detail: str, remedy: str = "", required: bool = True) -> Check:
    state: State = "ok" if ok else "failed" if required else "absent"
    return Check(name=name, state=state, detail=detail, remedy="" if ok else remedy)


def _package(name: str, remedy: str = "pip install salun", required: bool = True) -> Check:
    try:
        return _check(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _check(name, False, "not installed", remedy, required)


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a wheel for another processor or CUDA
        return _check("device", False, _line(error), "install torch for this machine")
    if not torch.cuda.is_available():
        return _check("device", True, "cpu")
    memory = torch.cuda.get_device_properties(0).total_memory / 1024**3
    return _check("device", True, f"{torch.cuda.get_device_name()}, {memory:.0f} GiB")


def _embedded() -> Check:
    from salun_core.storage.seaweedfs import find_binary

    try:
        return _check("embedded S3", True, find_binary().name)
    except SalunError as error:
        return _check("embedded S3", False, "not installed", error.remedy, required=False)


def _store(uri: str | None) -> Check:
    if not uri:
        return _check("store", False, "not set", "give --store s3://bucket/prefix", required=False)
    from salun_core.storage import open_store
    from salun_core.storage.probe import require_safe

    try:
        report = require_safe(open_store(uri))
    except SalunError as error:
        return _check("store", False, f"{error.what}: {error.why}", error.remedy)
    return _check("store", True, f"{report.uri} passed {len(report.checks)} of {len(report.checks)} checks")


def _gateway() -> Check:
    url = os.environ.get(URL_VARIABLE, "").strip()
    if not url:
        return _check("pushgateway", False, "not set", f"set {URL_VARIABLE} to push metrics", required=False)
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        socket.create_connection(place, _TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        return _check("pushgateway", False, _line(error), f"correct {URL_VARIABLE}; runs continue without metrics")
    return _check("pushgateway", True, f"{place[0]}:{place[1]} answers")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
