"""Starts the steps of a local run as forks of one process that has imported what they need.

A step of a pipeline computes for about a second, and a new process takes five to import torch and its friends. Here
one process, the nursery, imports them while the pipeline is loaded. It then forks a child for each step, which
executes the compiled component as the command in the pipeline says. A child shares nothing with other steps: what it
changes in its memory is its own.

The nursery starts no thread and no computation and touches no accelerator, so that a fork of it is safe. Libraries that
start threads at their import, OpenBLAS and pyarrow's jemalloc, prepare these for forks themselves.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

EXECUTOR = "kfp.dsl.executor_main"
PRELOADED = (
    EXECUTOR,
    "salun_core.pods.steps",
    "salun_core.pods.summary",
    "torch.utils.data",
    "pyarrow.compute",
    "pyarrow.parquet",
    "jinja2",
    "sklearn.datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
)
_COMMAND = ("sh", "-ec")
Start = Callable[[list[str], dict[str, str] | None], int]


class Nursery:
    """A process that forks a step each time it is asked, and imports `modules` once.

    Make it before this process starts threads or imports kfp. It ends when this process does, because the other end of
    its socket is closed then. `otherwise` starts a command of any other form in a process of its own.
    """

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        self.otherwise: Start = _in_new_process
        self._lock = threading.Lock()  # kfp starts the steps of a loop in threads
        self._control, theirs = socket.socketpair()
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            self._control.close()
            _serve(theirs, modules)  # does not return
        theirs.close()

    def start(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Run a step and copy its output to standard output.

        It replaces `run_local_subprocess` of kfp. Returns the step's exit code; 1 if a signal ended it.
        """
        if tuple(full_command[:2]) != _COMMAND or len(full_command) < 4 or f"-m {EXECUTOR}" not in full_command[2]:
            return self.otherwise(full_command, env_vars)
        (request, asked), (output, said), (status, ended) = os.pipe(), os.pipe(), os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._control, [b"."], [request, said, ended])
        except OSError:  # the nursery died, for example of an import that crashed
            for descriptor in (asked, output, status):
                os.close(descriptor)
            return self.otherwise(full_command, env_vars)
        finally:
            for descriptor in (request, said, ended):
                os.close(descriptor)
        with os.fdopen(asked, "w") as file:
            json.dump([full_command[3], full_command[4:], env_vars or {}], file)
        with os.fdopen(output, errors="replace") as lines, os.fdopen(status) as code:
            for line in lines:
                print(line, end="")
            print("\n")  # as kfp does
            return int(code.read() or 1)


def _in_new_process(command: list[str], variables: dict[str, str] | None) -> int:
    return subprocess.call(command, env={**os.environ, **(variables or {})})  # noqa: S603 - of the pipeline


def _serve(control: socket.socket, modules: Sequence[str]) -> NoReturn:
    """Be the nursery: import, then fork a child for each three descriptors that come in."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)  # or who reads this process's output waits for the end of the imports
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        os.environ["_KFP_RUNTIME"] = "true"  # read at the import of kfp, which then leaves out its compiler
        for name in modules:
            with suppress(ImportError):  # an extra that is not installed
                importlib.import_module(name)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that children that ended leave no zombies
        while descriptors := socket.recv_fds(control, 1, 3)[1]:
            if not os.fork():
                control.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _be_step(*descriptors)  # does not return
            for descriptor in descriptors:
                os.close(descriptor)
    finally:
        os._exit(0)  # without what the parent registered for its own end


def _be_step(request: int, output: int, ended: int) -> NoReturn:
    """Be a step: execute the component, and leave its exit code. One that is killed leaves none."""
    code = 1
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    try:
        with os.fdopen(request) as file:
            source, arguments, variables = json.load(file)
        os.environ.update(variables)
        code = _execute(source, arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - of any kind, as an interpreter that ends
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(ended, str(code).encode())
        os._exit(code)


def _execute(source: str, arguments: Sequence[str]) -> int:
    """Do what the command of a lightweight component does in a shell: write its source to a file, and execute it."""
    path = Path(tempfile.mkdtemp()) / "ephemeral_component.py"
    path.write_text(source, encoding="utf-8")
    sys.argv = [EXECUTOR, "--component_module_path", str(path), *arguments]
    sys.modules.pop(EXECUTOR, None)  # runpy warns of a module that it executes again
    runpy.run_module(EXECUTOR, run_name="__main__", alter_sys=True)
    return 0
