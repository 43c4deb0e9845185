"""A real S3 server (SeaweedFS) for demos and tests: on loopback only, and gone when its user is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from salun_core.errors import StoreError
from salun_core.storage.weed import find_binary, free_ports, launch, stop, write_account

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
