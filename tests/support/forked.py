"""Starts processes as forks of one that has imported torch and the command, which takes a new interpreter seconds.

Each test worker has at most one such server, which only imports: it has one thread, so that a fork of it is safe. A
few tests start the command as a user does, and its joined processes as new interpreters: those of
`tests/unit/methods/test_distributed.py`, `tests/e2e/test_cli.py` and `tests/unit/cli/test_interrupts.py`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "salun_core.cli.app",
        "salun_core.pods.steps",
        "salun_core.steps.mask",
        "salun_core.steps.unlearning",
        "sklearn.datasets",
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
link.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
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
    program = tmp_path_factory.mktemp("bin") / "salun"
    with _served() as address:
        program.write_text(SHIM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        yield program


@contextmanager
def _served() -> Iterator[str]:
    address = f"\0salun-{os.getpid()}"  # without a file, whose path would be too long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        threading.Thread(target=_accept, args=(listening,), daemon=True).start()
        yield address
        listening.shutdown(socket.SHUT_RDWR)


def _accept(listening: socket.socket) -> None:
    with suppress(OSError):  # it was closed
        while True:
            threading.Thread(target=_start, args=(listening.accept()[0],), daemon=True).start()


def _start(link: socket.socket) -> None:
    with link, link.makefile("rw") as lines:
        descriptors = socket.recv_fds(link, 1, 3)[1]
        args, folder, environ = json.loads(lines.readline())
        child = CONTEXT.Process(target=_as_child, args=(environ, _Streams(*descriptors), _command, args, folder))
        child.start()
        for descriptor in descriptors:
            os.close(descriptor)
        print(child.pid, file=lines, flush=True)
        child.join()
        with suppress(OSError):  # the program was killed
            print(child.exitcode, file=lines, flush=True)


def _command(args: list[str], folder: str) -> None:
    from salun_core.cli.app import main

    os.chdir(folder)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["salun", *args]
    main()
