"""The demo's store: an S3 server on loopback in the demo's own folder, named by the environment while it runs."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from salun_core.certificates.keys import SIGNING_VARIABLE, VERIFY_VARIABLE, create_key
from salun_core.errors import UsageError
from salun_core.storage.seaweedfs import embedded_s3

ENVIRONMENT = "s3.env"
STORE_VARIABLE = "SALUN_STORE_URI"
_MARKER = ".salun-demo"
_FOREIGN = ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")


@contextmanager
def demo_store(work: Path, port: int | None, fresh: bool, must_exist: bool = False) -> Iterator[str]:
    """Run the store as long as the block lasts; nothing of it is left running afterwards.

    While it runs, `s3.env` in the folder holds what a shell must set to reach it.

    Args:
        work: the demo's folder.
        port: of the server; None takes a free one.
        fresh: begin with an empty folder; else go on with what is there.
        must_exist: refuse a folder without an earlier demo.

    Yields:
        The address of the store.

    Raises:
        UsageError: the folder holds something else, or another demo runs there.
        StoreError: the server cannot be started.
    """
    with _owned(work, fresh, must_exist), embedded_s3(work / "store", port=port) as server:
        variables = {**server.environ, STORE_VARIABLE: server.uri, **_keys(work / "keys")}
        with _environment(variables), _noted(work / ENVIRONMENT, variables):
            yield server.uri


def _keys(folder: Path) -> dict[str, str]:
    """Make the demo's signing key where there is none, and return the variables that name its files."""
    private, public = (folder.resolve() / f"salun.{ending}" for ending in ("pem", "pub"))
    if not private.is_file():
        create_key(folder / "salun")
    return {SIGNING_VARIABLE: str(private), VERIFY_VARIABLE: str(public)}


@contextmanager
def _owned(work: Path, fresh: bool, must_exist: bool) -> Iterator[None]:
    """Hold the folder for one demo, and empty it if asked; a folder that no demo made is refused."""
    if work.exists() and (not work.is_dir() or any(work.iterdir())) and not (work / _MARKER).is_file():
        raise UsageError(f"{work} is not a folder of the demo", "it holds something else", "give another --work-dir")
    if must_exist and not (work / "store").is_dir():
        raise UsageError(f"there is no demo in {work}", "none was run there", "run `salun demo` first")
    work.mkdir(parents=True, exist_ok=True)
    with (work / _MARKER).open("w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"{work} is in use", "another demo runs there", "wait for it, or give another --work-dir"
            ) from error
        if fresh:
            for item in work.iterdir():
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                elif item.name != _MARKER:
                    item.unlink()
        yield


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Point this process and its children at the store, and away from the user's own account."""
    changed = {**variables, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    before = {name: os.environ.get(name) for name in (*changed, *_FOREIGN)}
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _noted(path: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """Keep the variables in a file that only its owner can read, until the server ends."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
