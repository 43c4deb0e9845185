"""Runs a compiled pipeline on this machine, each step in a process of its own, as kfp.local does.

The whole run is one group of processes under this one, so that nothing of it outlives an interrupt.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from salun_core import errors
from salun_core.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
LOG = "run.log"
KEPT = {"evaluate/evidence": "evidence.json", "gate-publish/decision.json": "decision.json"}
REPORTS = ("gate-publish/report", "evaluate/report")  # the one with the verdict, where the run came that far
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(r"- Executing task '([a-z0-9-]+)'$")
_FAILED = re.compile(r"- Task '([a-z0-9-]+)' finished with status FAILURE$")
_ERROR = re.compile(r"^\s*(?:salun_core\.errors\.)?(\w*(?:Error|Exception|Interrupt)): (.+)$")
_GRACE = 5.0


@dataclass
class LocalRun:
    """What a run on this machine did.

    Args:
        folder: working folder.
        exit_code: 0; or that of the error which ended it: 3 gate refused, 4 stale parent, and so on.
        run: its id.
        steps: seconds by step, in order.
        failed: the first step that failed; a step that always runs may come after it.
        error: the message of that step.
        version: digest of the version that is HEAD now, after a run that passed.
        parent: digest of the version that the run started from.
        outputs: the values that each step returned, by step and name.
        files: by name: evidence.json, decision.json, report.html, run.log; what the run came to write.
    """

    folder: Path
    exit_code: int = 1
    run: str = ""
    steps: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    error: str = ""
    version: str | None = None
    parent: str | None = None
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def run_compiled(
    pipeline: Path,
    arguments: Mapping[str, Any],
    folder: str | Path,
    say: Callable[[str], None] = lambda line: None,
    echo: Callable[[str], None] = lambda line: None,
) -> LocalRun:
    """Run a compiled pipeline.

    Args:
        pipeline: the YAML file.
        arguments: the run form.
        folder: working folder on this machine; made where it is missing.
        say: called with a line as each step starts and ends.
        echo: called with every line of the log.

    Returns:
        What happened; a failed step is no exception here.

    Raises:
        UsageError: the folder is none of this machine, the pipeline cannot be read, or the arguments do not fit it.
    """
    if "://" in str(folder) or str(folder).startswith("s3:"):
        raise UsageError(f"{folder} is no folder of this machine", "a local run writes files", "give a local folder")
    folder = Path(folder).absolute()
    try:
        text = pipeline.read_text(encoding="utf-8")
        spec = next(yaml.safe_load_all(text))
        total, declared = len(spec["deploymentSpec"]["executors"]), spec["root"]["inputDefinitions"]["parameters"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise UsageError(f"cannot run {pipeline}", f"no compiled pipeline: {error}", "`make generated`") from error
    _check_arguments(pipeline, arguments, declared)
    steps, scratch = _new_folders(folder)
    run = LocalRun(folder, run=f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")
    job = {"pipeline": text, "run": run.run, "arguments": dict(arguments), "root": str(steps)}
    try:
        with _worker(job, scratch) as worker, (folder / LOG).open("w", encoding="utf-8") as log:
            _follow(worker, log.write, _Progress(run, total, say), echo)
        run.exit_code = _exit_code(worker.returncode, run)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _collect(run, steps)
    return run


def _check_arguments(pipeline: Path, arguments: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    unknown = sorted(set(arguments) - set(declared))
    missing = sorted(name for name, item in declared.items() if not item.get("isOptional") and name not in arguments)
    faults = [f"it has no {name}" for name in unknown] + [f"it needs {name}" for name in missing]
    if faults:
        raise UsageError(f"the arguments do not fit {pipeline.name}", ", ".join(faults), "see `--help`")


def _new_folders(folder: Path) -> tuple[Path, Path]:
    try:
        (folder / "steps").mkdir(parents=True, exist_ok=True)
        steps = tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder / "steps")
        return Path(steps), Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}", str(error), "give another working folder") from error


@contextmanager
def _worker(job: Mapping[str, Any], scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the run in a group of its own, and leave none of the group behind."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
    with _stopped_by_signals():
        worker = subprocess.Popen(
            [sys.executable, "-m", "pipelines.local_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environ,
            start_new_session=True,
        )
        try:
            assert worker.stdin is not None
            with suppress(BrokenPipeError), worker.stdin as stdin:
                json.dump(job, stdin)
            yield worker
            worker.wait()
        finally:
            _stop(worker)


def _stop(worker: subprocess.Popen[str]) -> None:
    """End the whole group: politely, then not."""
    deadline = time.monotonic() + _GRACE
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(worker.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        while time.monotonic() < deadline and _alive(worker):
            time.sleep(0.05)
    worker.wait()


def _alive(worker: subprocess.Popen[str]) -> bool:
    worker.poll()
    try:
        os.killpg(worker.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that the group is ended before this process is."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """Tells which step runs, and remembers what the run said last."""

    def __init__(self, run: LocalRun, total: int, say: Callable[[str], None]) -> None:
        self.run, self.total, self.say = run, total, say
        self.started = time.monotonic()

    def line(self, text: str) -> None:
        """Take one line of the log."""
        if step := _STEP.search(text):
            self.close()
            self.run.steps[step[1]] = 0.0
            if not self.run.failed:
                self.run.error = ""
            self.started = time.monotonic()
            self.say(f"Executing task {step[1]} ({len(self.run.steps)} of {self.total})")
        elif self.run.failed:  # what comes after it is about a step that always runs
            return
        elif failed := _FAILED.search(text):
            self.run.failed = failed[1]
        elif error := _ERROR.match(text):
            self.run.error, self.run.exit_code = error[2], _code_of(error[1])

    def close(self) -> None:
        """End the step that runs."""
        if self.run.steps:
            last = list(self.run.steps)[-1]
            self.run.steps[last] = time.monotonic() - self.started
            self.say(f"  {self.run.steps[last]:.1f} s")


def _code_of(name: str) -> int:
    kind = getattr(errors, name, None)
    return kind.exit_code if isinstance(kind, type) and issubclass(kind, errors.SalunError) else 1


def _follow(
    worker: subprocess.Popen[str], write: Callable[[str], Any], progress: _Progress, echo: Callable[[str], None]
) -> None:
    assert worker.stdout is not None
    for raw in worker.stdout:
        text = _COLOUR.sub("", raw.rstrip("\n"))
        write(text + "\n")
        echo(text)
        progress.line(text)
    progress.close()


def _exit_code(returncode: int, run: LocalRun) -> int:
    if returncode == 0:
        run.error = ""
        return 0
    run.error = run.error or f"the run ended with status {returncode}; see its log"
    return run.exit_code or 1


def _collect(run: LocalRun, steps: Path) -> None:
    """Copy what a reader wants to the top of the working folder."""
    run.files[LOG] = run.folder / LOG
    found = next(iter(sorted(path for path in steps.iterdir() if path.is_dir())), steps)
    report = next((name for name in REPORTS if (found / name).is_file()), REPORTS[0])
    for source, name in {**KEPT, report: "report.html"}.items():
        (run.folder / name).unlink(missing_ok=True)  # of an earlier run in the same folder
        if (found / source).is_file():
            shutil.copyfile(found / source, run.folder / name)
            run.files[name] = run.folder / name
    for path in sorted(found.glob("*/executor_output.json")):
        run.outputs[path.parent.name] = json.loads(path.read_text(encoding="utf-8")).get("parameterValues", {})
    run.parent, run.version = (run.outputs.get(step, {}).get("Output") for step in ("fetch-model", "gate-publish"))
