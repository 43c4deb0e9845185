"""The command as a process: the whole demo with the compiled pipeline, and what an interrupt leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salun_core.cli.app import load_examples

pytestmark = pytest.mark.e2e

SALUN = (sys.executable, "-c", "from salun_core.cli.app import main; main()")


def _environment(**more):
    foreign = {name for name in os.environ if name.startswith(("AWS_", "SALUN_S3_"))} | {
        "SALUN_STORE_URI",
        "PUSHGATEWAY_URL",
    }
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def _run(folder, *args, program=SALUN, **environ):
    command = [*program, *map(str, args)]
    return subprocess.run(command, cwd=folder, env=_environment(**environ), capture_output=True, text=True, check=False)


def _left_behind(folder):
    """Return the processes that work in a folder, or that were told of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            cwd, command = (process / "cwd").readlink(), (process / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if cwd.is_relative_to(folder) or str(folder).encode() in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.fixture(autouse=True)
def _needs_a_server(s3_server):
    """Skips where no S3 server is installed."""


def test_the_demo_runs_the_compiled_pipeline_and_the_commands_that_it_names_next_work(tmp_path, salun_path):
    work = tmp_path / "work"
    first = _run(tmp_path, "demo", "--work-dir", work, program=[salun_path])
    assert first.returncode == 0, first.stdout + first.stderr
    assert "running the compiled pipeline with kfp.local" in first.stderr
    assert "PASSED" in first.stdout
    assert "Traceback" not in first.stderr
    shown = [_name(line) for line in load_examples()["demo"].splitlines()[1:]]
    assert [_name(line) for line in first.stdout.strip().splitlines()] == shown
    assert _left_behind(tmp_path) == []
    _look_into_the_store(tmp_path, work, first.stdout, salun_path)


def _name(line):
    words = re.split(r" {2,}", line.strip())[0]
    return re.sub(r"\b[0-9a-f]{12}\b|\d+", "N", re.sub(r"─+", "─", re.sub(r"\S*/\S*", "PATH", words)))


def _look_into_the_store(tmp_path, work, printed, salun):
    served = _start(tmp_path, "demo", "--serve", "--work-dir", work, program=[salun])
    try:
        _wait_for(served, "is served until Ctrl-C")
        lines = (work / "s3.env").read_text().replace("'", "").splitlines()
        environ = dict(line.split("=", 1) for line in lines)
        assert (work / "s3.env").stat().st_mode & 0o077 == 0
        told = _run(tmp_path, "model", "history", "demo", "--json", program=[salun], **environ)
        assert [(item["method"], item["requests"]) for item in json.loads(told.stdout)] == [
            ("salun_adaptive", 4),
            ("train", None),
        ]
        listed = _run(tmp_path, "request", "list", "--json", program=[salun], **environ)
        assert {item["status"] for item in json.loads(listed.stdout)} == {"completed"}
        verify = next(line for line in printed.splitlines() if line.strip().startswith("salun verify"))
        verified = _run(tmp_path, *verify.split()[1:], program=[salun], **environ)
        assert verified.returncode == 0, verified.stderr
        (Path(verify.split()[-1]) / "split.parquet").write_text("{}")
        assert _run(tmp_path, *verify.split()[1:], program=[salun], **environ).returncode == 5
    finally:
        os.killpg(served.pid, signal.SIGINT)
        served.communicate(timeout=60)
    assert served.returncode == 130
    assert _left_behind(tmp_path) == []


def _start(folder, *args, program=SALUN):
    command = [*program, *map(str, args)]
    return subprocess.Popen(
        command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def _wait_for(process, text):
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting the store", signal.SIGTERM),
        ("training resnet8", signal.SIGINT),
        ("Executing task", signal.SIGTERM),  # of SIGINT there: tests/pipelines/test_compiled_run.py
    ],
)
def test_an_interrupt_leaves_no_process_behind(tmp_path, moment, number):
    process = _start(tmp_path, "demo", "--epochs", "1", "--work-dir", tmp_path / "work")
    _wait_for(process, moment)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    _wait_until_gone(tmp_path)
    assert not (tmp_path / "work" / "s3.env").exists()


def _wait_until_gone(folder):
    for _ in range(50):
        left = _left_behind(folder)
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = " ".join([f"'{SALUN[0]}'", SALUN[1], f"'{SALUN[2]}'", "ls data | true"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=_environment(), check=False)
    assert done.stderr == ""


def test_the_traceback_is_for_those_who_ask(tmp_path, salun_path):
    args = ("mask", "--model", "nowhere/at-all", "--forget", "f.json", "--out", "m")
    plain, debug = (_run(tmp_path, *args, *more, program=[salun_path]) for more in ((), ("--debug",)))
    assert plain.returncode == debug.returncode == 2
    assert len(plain.stderr.splitlines()) == 1
    assert "Traceback" in debug.stderr
