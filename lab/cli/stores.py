"""`salun store serve`: an S3 server on loopback, for laptops and tests."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from salun_core.cli.output import echo, emit, progress
from salun_core.cli.verbs import without_settings

if TYPE_CHECKING:
    from lab.seaweedfs import EmbeddedServer

SETTINGS = ".env"
PORT = 8333  # of S3 in SeaweedFS's own documents


class StoreGroup(TyperGroup):
    """Run your own object store."""


@without_settings
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the data; it is created.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the S3 API.")] = PORT,
    bucket: Annotated[str, typer.Option("--bucket", help="Bucket to create.")] = "salun",
) -> None:
    """Run an S3 server on this machine until Ctrl-C. Keys and data stay in DIR for the next start."""
    from lab.seaweedfs import embedded_s3
    from salun_core.errors import StoreError
    from salun_core.storage import split_uri

    split_uri(f"s3://{bucket}")
    settings = folder.resolve() / SETTINGS
    try:
        with embedded_s3(folder, bucket, port, keep_account=True) as server:
            _write_secret(settings, _settings(server))
            facts = {
                "store": server.uri,
                "endpoint": server.endpoint,
                "access_key": server.access_key,
                "secret_key": server.secret_key,
                "settings": settings,
                "pid": os.getpid(),
            }
            emit(facts, lambda: _show(facts))
            while _runs(server.pid):
                time.sleep(0.5)
            raise StoreError("the store ended", "its server process is gone", f"see {folder / 'weed.log'}")
    except KeyboardInterrupt:
        progress("the store has stopped; its data stay in the folder")


def _show(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        echo(f"{name.replace('_', ' '):<10}  {value}")
    echo(f"\nIn another shell:\n  set -a; . {shlex.quote(str(facts['settings']))}; set +a\n  salun doctor")
    echo("\nThe store is served until Ctrl-C. It listens on this machine only.")


def _settings(server: EmbeddedServer) -> str:
    """Return the variables of a shell that uses the store: our own, which win over AWS_*."""
    environ = server.environ
    variables = {
        "SALUN_STORE_URI": server.uri,
        "SALUN_S3_ENDPOINT_URL": server.endpoint,
        "SALUN_S3_REGION": environ["AWS_REGION"],
        "SALUN_S3_ACCESS_KEY_ID": server.access_key,
        "SALUN_S3_SECRET_ACCESS_KEY": server.secret_key,
        **{name: environ[name] for name in ("NO_PROXY", "no_proxy")},
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(["# The store of `salun store serve`. It holds the secret key.", *lines, ""])


def _write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from the first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _runs(pid: int) -> bool:
    """Return whether our child still runs; one that ended is left for its owner to reap."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
