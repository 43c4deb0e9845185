"""A PostgreSQL server for a benchmark: Debian's, with its default settings, so that a commit waits for the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salun_core.storage.seaweedfs import die_with_parent

_READY_SECONDS = 30.0


class PostgresMissingError(Exception):
    """There is no PostgreSQL here; the message says what is missing."""


def _programs() -> Path:
    """Return the folder of `initdb` and `postgres`."""
    try:
        import psycopg  # noqa: F401 - only whether it is there
    except ImportError:
        raise PostgresMissingError("psycopg is not installed; pip install 'psycopg[binary]'") from None
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    at_hand = shutil.which("initdb")
    if not found and not at_hand:
        raise PostgresMissingError("initdb was not found; apt-get install --no-install-recommends postgresql")
    return (found[-1] if found else Path(str(at_hand))).parent


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Run a server of its own in a temporary folder, on a Unix socket only, and yield how to connect.

    PostgreSQL refuses to run as root; root becomes the user `postgres` for it. It ends with this process.

    Raises:
        PostgresMissingError: it is not installed, or does not start.
    """
    programs = _programs()
    account: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if not os.geteuid() else {}
    with tempfile.TemporaryDirectory(prefix="salun-pg-") as folder:
        if account:
            shutil.chown(folder, "postgres", "postgres")
        data, log = Path(folder) / "data", Path(folder) / "log"
        options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **account}
        with log.open("wb") as output:
            initialise = [
                str(programs / "initdb"),
                "-D",
                str(data),
                "-U",
                "postgres",
                "-A",
                "trust",
                "--no-instructions",
            ]
            if subprocess.run(initialise, stdout=output, **options).returncode:
                raise PostgresMissingError(f"initdb failed: {_last_line(log)}")
            flags = ["-D", str(data), "-k", folder, "-c", "listen_addresses="]
            process = subprocess.Popen(
                [str(programs / "postgres"), *flags], stdout=output, preexec_fn=die_with_parent(), **options
            )
        where = f"host={folder} user=postgres dbname=postgres"
        try:
            _wait(process, where, log)
            yield where
        finally:
            process.send_signal(signal.SIGINT)  # "fast": ends sessions, and writes all to disk
            process.wait()


def _wait(process: subprocess.Popen[bytes], where: str, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + _READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(where) as connection:
            connection.execute("SELECT 1")
            return
        time.sleep(0.1)
    raise PostgresMissingError(f"it did not start: {_last_line(log)}")


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"])[-1]
