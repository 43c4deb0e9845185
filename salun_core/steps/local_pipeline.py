"""Runs the compiled pipeline on this machine, in a process of its own: this package knows no kfp."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import salun_core
from salun_core.errors import SalunError
from salun_core.storage.seaweedfs import die_with_parent

_STEP = re.compile(r"Executing task '?([a-z0-9-]+)'?")
_STOP_SECONDS = 10.0


def find_checkout() -> Path | None:
    """Return the folder with `pipelines/`: the working directory, or the one that this package was installed from.

    None where there is neither, or kfp is not installed.
    """
    if importlib.util.find_spec("kfp") is None:
        return None
    places = (Path.cwd(), Path(salun_core.__file__).resolve().parents[1])
    return next((place for place in places if (place / "pipelines" / "__main__.py").is_file()), None)


def run_pipeline(checkout: Path, arguments: Mapping[str, str | bool], folder: Path, say: Callable[[str], None]) -> int:
    """Run `python -m pipelines run`; it ends with this process, by Ctrl-C or SIGTERM too.

    Args:
        checkout: from `find_checkout`.
        arguments: of the pipeline, by name; True is a flag, False is left out.
        folder: what the steps make goes to `outputs`, what they print to `pipeline.log`.
        say: called with the name of each step before it starts.

    Returns:
        The exit code.

    Raises:
        SalunError: it could not be started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = [_option(name, value) for name, value in arguments.items() if value is not False]
    command = [sys.executable, "-m", "pipelines", "run", *options, f"--output-dir={(folder / 'outputs').resolve()}"]
    with (folder / "pipeline.log").open("w", encoding="utf-8") as log:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module; no shell
                command,
                cwd=checkout,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own: the terminal's Ctrl-C is for us, who end it then
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            raise SalunError("cannot start the pipeline", str(error), "check the Python installation") from error
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                if step := _STEP.search(line):
                    say(step[1])
            return process.wait()
        finally:
            _end(process)


def _option(name: str, value: str | bool) -> str:
    option = f"--{name.replace('_', '-')}"
    return option if value is True else f"{option}={value}"


def _end(process: subprocess.Popen[str]) -> None:
    """End the process, which then ends all that it started, also when a second Ctrl-C comes while we wait."""
    try:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
            process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of the group is gone
        os.killpg(process.pid, number)


def last_error(log: Path) -> str:
    """Return the line of a log that says best what went wrong."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"(Error|Exception)\b.*:", line)]
    told = (telling or lines or ["it printed nothing"])[-1].removeprefix("Error: ")
    return told.partition(". To fix it:")[0][:400]
