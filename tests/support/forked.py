"""Starts processes as forks of one that has imported torch and the command, which takes a new interpreter seconds.

Each test worker has at most one such server, which only imports: it starts no thread, so that a fork of it is safe. A
few tests start the command as a user does, and its joined processes as new interpreters: those of
`tests/unit/methods/test_distributed.py`, `tests/e2e/test_cli.py`, `tests/unit/cli/test_interrupts.py` and
`tests/pipelines/test_compiled_run.py`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest

from tests.support import pictures

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.support.pictures",  # before what it changes is imported
        "salun_core.cli.app",
        "salun_core.pods.steps",
        "salun_core.steps.mask",
        "salun_core.steps.unlearning",
        "kfp.local",
        "pipelines.runs",
        "pipelines.schedules",
        "matplotlib.backends.backend_agg",
        "jinja2",
        "pyarrow.compute",
        "pyarrow.parquet",
        "sklearn.datasets",
        "sklearn.linear_model",
        "torch._dynamo",  # any optimizer imports it
        "torch.distributed",
        "torch.distributed.elastic.multiprocessing",
        "torch.nn.parallel",
        "tests.reliability.worker",
        "tests.reliability.children",
    ]
)
SHIM = """#!{python} -IS
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
socket.send_fds(link, [b"."], [0, 1, 2])
link.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
answer = link.makefile()
child = int(answer.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child, number))
code = int(answer.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class _Streams:
    """Descriptors of this process that a forked one unpickles as its standard input, output and error."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, tuple((number, reduction.DupFd(found)) for number, found in enumerate(self.descriptors))


def _take(*pairs: tuple[int, Any]) -> None:
    for number, given in pairs:
        descriptor = given.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)


def _as_child(environ: dict[str, str], _: None, function: Callable[..., object], *args: object) -> None:
    """Run with the variables of the process that asked: the server has those of the time when it was started."""
    os.environ.clear()
    os.environ.update(environ)
    tempfile.tempdir = None  # to be found again: TMPDIR may be another
    function(*args)


@pytest.fixture(scope="session")
def forked_processes() -> Iterator[None]:
    """The processes that torch spawns for this one are forks, until the session ends."""
    spawn = importlib.import_module("torch.multiprocessing.spawn")  # the attribute of this name is its function
    start = spawn.start_processes

    def forked(fn, args=(), nprocs=1, join=True, daemon=False, start_method="spawn"):  # noqa: PLR0913 - torch's
        child = partial(_as_child, dict(os.environ), _Streams(0, 1, 2), fn)
        return start(child, args, nprocs, join, daemon, "forkserver")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "start_processes", forked)
        patch.setattr("torch.multiprocessing.start_processes", forked)
        yield


@pytest.fixture(scope="session")
def salun_path(tmp_path_factory) -> Iterator[Path]:
    """A program `salun` in a folder of its own: what is given to it goes to a fork that runs the command.

    It hands over its descriptors, folder and variables, passes on SIGINT and SIGTERM, and ends as the fork does.
    """
    program = _program(tmp_path_factory.mktemp("bin") / "salun")
    with _served():
        yield program


def _address() -> str:
    return f"\0salun-{os.getpid()}"  # without a file, whose path would be too long


def _program(path: Path) -> Path:
    path.write_text(SHIM.format(python=sys.executable, address=_address()))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def python_path(salun_path, tmp_path_factory) -> Path:
    """A program `python` in a folder of its own, which knows `-m MODULE` and scripts, and runs them in a fork too."""
    return _program(tmp_path_factory.mktemp("bin") / "python")


@pytest.fixture
def forked_runs(python_path, monkeypatch) -> None:
    """What a test starts with this interpreter is a fork: `run_compiled` starts each local run with it.

    An interrupt reaches only the fork, and not what it started: such a test needs new interpreters.
    """
    monkeypatch.setattr(sys, "executable", str(python_path))


@contextmanager
def _served() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(_address())
        listening.listen()
        threading.Thread(target=_accept, args=(listening,), daemon=True).start()
        yield
        listening.shutdown(socket.SHUT_RDWR)


def _accept(listening: socket.socket) -> None:
    with suppress(OSError):  # it was closed
        while True:
            threading.Thread(target=_start, args=(listening.accept()[0],), daemon=True).start()


def _start(link: socket.socket) -> None:
    with link, link.makefile("rw") as lines:
        descriptors = socket.recv_fds(link, 1, 3)[1]
        words, folder, environ = json.loads(lines.readline())
        child = CONTEXT.Process(target=_as_child, args=(environ, _Streams(*descriptors), _command, words, folder))
        child.start()
        for descriptor in descriptors:
            os.close(descriptor)
        print(child.pid, file=lines, flush=True)
        child.join()
        with suppress(OSError):  # the program was killed
            print(child.exitcode, file=lines, flush=True)


def _command(words: list[str], folder: str) -> None:
    os.chdir(folder)
    sys.stdin = os.fdopen(0, closefd=False)
    with pictures.left_out():
        if Path(words[0]).name == "salun":
            from salun_core.cli.app import main

            sys.argv = ["salun", *words[1:]]
            main()
        else:
            be_python(*words[1:])


def be_python(*words: str) -> None:
    """Do what `python -u -m NAME ARGS` or `python -u FILE ARGS` does."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


@contextmanager
def forked_module(name: str, *args: str) -> Iterator[tuple[Any, Any]]:
    """Run a module in a fork with the variables of this process; gives it, and what it writes to standard error."""
    read, write = os.pipe()
    streams = _Streams(0, 1, write)
    child = CONTEXT.Process(target=_as_child, args=(dict(os.environ), streams, be_python, "-m", name, *args))
    with os.fdopen(read) as said:
        try:
            child.start()
            os.close(write)
            yield child, said
        finally:
            child.kill()
            child.join()
