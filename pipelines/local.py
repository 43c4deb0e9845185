"""Runs a compiled pipeline on this machine with kfp.local, each step in a process of its own.

kfp.local blocks until the pipeline ends and has neither callbacks nor a result, so the run is a process of its own
(`python -m pipelines.local`) whose log is read while it works. The three patterns below match lines that are the same
in kfp 2.16.0 and 2.17.3; test_compiled_run.py fails if they change.

The run and its steps are one process group, which this process ends, so that nothing of it outlives an interrupt.
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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from pipelines.forked_steps import Nursery
from pipelines.packages import load_documents, read_package
from pipelines.volumes import CACHE_VARIABLE
from salun_core.errors import SalunError, UsageError, exit_code_of
from salun_core.gate import DECISION
from salun_core.pods.reference import read_reference
from salun_core.registry.lookup import Version, read_file, read_version
from salun_core.steps.outcome import EVIDENCE, REPORT, OutcomeRecord, read_outcome
from salun_core.storage import open_store
from salun_core.storage.keys import run_key
from salun_core.storage.s3 import S3Store

ROOT = Path(__file__).resolve().parent.parent
LOG = "run.log"
REPORTS = ("gate-publish/report", "sweep-compact/report", "evaluate/report")  # the last one has no verdict
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(r"- Executing task '([a-z0-9-]+)'$")
_FAILED = re.compile(r"- Task '([a-z0-9-]+)' finished with status FAILURE$")
_ERROR = re.compile(
    r"^\s*(?:salun_core\.errors\.)?(\w*(?:Error|Exception|Interrupt)): (.+)$"
)  # the last line of a step
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_JOB_ID = "{{$.pipeline_job_uuid}}"  # dsl.PIPELINE_JOB_ID_PLACEHOLDER


@dataclass
class LocalRun:
    """The outcome of a run on this machine.

    Args:
        folder: working folder.
        exit_code: 0, or that of the error that ended the run: 3 gate refused, 4 stale parent, and so on.
        run: its id.
        steps: seconds by step, in order.
        failed: the step that ended the run; the steps that follow pass on.
        error: what it said.
        outcome: what the run wrote about its end; None if it wrote nothing.
        version: digest of the version that is HEAD now, after a run that passed.
        parent: digest of the version that the run started from.
        outputs: the values that each step returned, by step and name.
        files: by name: evidence.json, decision.json, report.html, run.log; those that the run wrote.
    """

    folder: Path
    exit_code: int = 1
    run: str = ""
    steps: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    error: str = ""
    outcome: OutcomeRecord | None = None
    version: str | None = None
    parent: str | None = None
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def run_compiled(
    pipeline: Path,
    arguments: Mapping[str, Any],
    folder: str | Path,
    progress: Callable[[str], None] = lambda line: None,
    log: Callable[[str], None] = lambda line: None,
    *,
    forked: bool = sys.platform == "linux",
) -> LocalRun:
    """Run a compiled pipeline on this machine; a failed step does not raise.

    `progress` gets a line as each step starts and ends, `log` every line of the log. If `forked`, the steps are forks
    of one process, which saves each of them the imports; only Linux has a fork that is safe with the libraries which
    the steps import.
    """
    if "://" in str(folder) or str(folder).startswith("s3:"):  # kfp.local would make a folder with that name
        raise UsageError(f"{folder} is not a folder of this machine", "a local run writes files", "give a local folder")
    folder = Path(folder).absolute()
    total = len(read_package(pipeline).spec["deploymentSpec"]["executors"])
    steps, scratch = _new_folders(folder)
    run = LocalRun(folder, run=f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")
    job = {
        "pipeline": str(pipeline.absolute()),
        "run": run.run,
        "arguments": dict(arguments),
        "root": str(steps),
        "forked": forked,
    }
    try:
        with _worker(job, scratch) as worker:
            _follow(worker, run, total, progress, log)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if worker.returncode == 0:
        run.exit_code, run.error = 0, ""  # what a step reported and survived is not the run's error
    else:
        run.exit_code = run.exit_code or 1
        run.error = run.error or f"the run ended with status {worker.returncode}; see its log"
    _collect(run, steps, arguments)
    return run


@contextmanager
def exit_on_signals(*numbers: int) -> Iterator[None]:
    """Turn signals into SystemExit with the exit code that a shell gives them, so that cleanup runs."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_folders(folder: Path) -> tuple[Path, Path]:
    try:
        (folder / "steps").mkdir(parents=True, exist_ok=True)
        steps = tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder / "steps")
        return Path(steps), Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}", str(error), "give another working folder") from error


@contextmanager
def _worker(job: Mapping[str, Any], scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the run in a process group of its own, and end the whole group."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
    with exit_on_signals(signal.SIGTERM, signal.SIGHUP):
        worker = subprocess.Popen(
            [sys.executable, "-m", "pipelines.local"],
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
    """End the whole group: first politely, then by force."""
    deadline = time.monotonic() + _GRACE
    with suppress(ProcessLookupError, PermissionError):  # nobody of the group is left
        os.killpg(worker.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            worker.poll()  # removes the zombie, which would count as a member
            os.killpg(worker.pid, 0)
            time.sleep(0.05)
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _follow(
    worker: subprocess.Popen[str],
    run: LocalRun,
    total: int,
    progress: Callable[[str], None],
    log: Callable[[str], None],
) -> None:
    """Copy the log of a run to its file, and take from it which step runs, which one failed first, and why."""
    started = time.monotonic()

    def end_step() -> None:
        if run.steps:
            last = list(run.steps)[-1]
            run.steps[last] = time.monotonic() - started
            progress(f"  {run.steps[last]:.1f} s")

    assert worker.stdout is not None
    with (run.folder / LOG).open("w", encoding="utf-8") as file:
        for raw in worker.stdout:
            text = _COLOUR.sub("", raw.rstrip("\n"))
            file.write(text + "\n")
            log(text)
            if step := _STEP.search(text):
                end_step()
                run.steps[step[1]], started = 0.0, time.monotonic()
                progress(f"Executing task {step[1]} ({len(run.steps)} of {total})")
                if not run.failed:
                    run.error = ""
            elif run.failed:  # later errors are those of a step that always runs
                continue
            elif failed := _FAILED.search(text):
                run.failed = failed[1]
            elif error := _ERROR.match(text):
                run.error, run.exit_code = error[2], exit_code_of(error[1]) or 1
    end_step()


def _collect(run: LocalRun, steps: Path, arguments: Mapping[str, Any]) -> None:
    """Copy the files for the reader to the top of the working folder, and read the outcome and what steps returned."""
    run.files[LOG] = run.folder / LOG
    found = next(iter(sorted(path for path in steps.iterdir() if path.is_dir())), steps)
    for name in (EVIDENCE, DECISION, REPORT):
        (run.folder / name).unlink(missing_ok=True)  # of an earlier run in the same folder
    if report := next((found / name for name in REPORTS if (found / name).is_file()), None):
        shutil.copyfile(report, run.folder / REPORT)
        run.files[REPORT] = run.folder / REPORT
    for path in sorted(found.glob("*/executor_output.json")):
        run.outputs[path.parent.name] = json.loads(path.read_text(encoding="utf-8")).get("parameterValues", {})
    if (inputs := found / "fetch-model" / "inputs").is_file():
        run.parent = str(read_reference(inputs).facts.get("version", "")) or None
    try:
        _read_store(run, open_store(str(arguments["store_uri"])), str(arguments["model_line"]))
    except (SalunError, KeyError) as error:  # the run itself said what is wrong with the store
        run.error = run.error or str(error)


def _read_store(run: LocalRun, store: S3Store, line: str) -> None:
    """Read the outcome of a run, and the evidence and decision that it left."""
    outcome = run.outcome = read_outcome(store, run.run)
    if outcome is None or not outcome.final:
        return
    run.exit_code, run.version = outcome.code, outcome.version or None
    if outcome.code:
        run.failed, run.error = outcome.step.replace("_", "-") or run.failed, outcome.text
    version = Version(outcome.version, read_version(store, line, outcome.version)) if outcome.version else None
    for name in (EVIDENCE, DECISION):
        stored = store.get(run_key(run.run, name))
        data = read_file(store, version, name) if version else stored.data if stored else None
        if data is not None:
            (run.folder / name).write_bytes(data)
            run.files[name] = run.folder / name


def main() -> int:
    """Run the pipeline that standard input describes, with the log on standard output; returns 1 if a step failed."""
    given = json.load(sys.stdin)
    warnings.filterwarnings("ignore", module="kfp")  # about images and resources, which have no effect here
    nursery = Nursery() if given["forked"] else None
    from kfp import components, local
    from kfp.local import subprocess_task_handler as handler

    if nursery:
        nursery.otherwise = handler.run_local_subprocess
        handler.run_local_subprocess = nursery.start

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=given["root"])
    text = Path(given["pipeline"]).read_text(encoding="utf-8")
    pipeline = components.load_component_from_text(for_this_machine(text, given["run"], os.environ))
    try:
        pipeline(**given["arguments"])
    except RuntimeError as error:  # a step failed
        print(error)
        return 1
    return 0


def for_this_machine(text: str, run: str, environ: Mapping[str, str]) -> str:
    """Return a compiled pipeline with the changes that a run on this machine needs.

    Its steps are not retried, because somebody waits for the first answer. A variable of the environment of the steps
    wins over one that names a place in the image. No volume is mounted, so no cache of the data is kept in its folder.
    The id of the run is unique; that of kfp.local has only eight digits.
    """
    documents = load_documents(text.replace(_JOB_ID, run))
    spec = documents[0]
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
            _rename_condition(task)
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        if given := container.pop("env", None):
            container["env"] = [item for item in given if item["name"] not in {*environ, CACHE_VARIABLE}]
    return str(yaml.dump_all(documents, Dumper=_DUMPER))


def _rename_condition(task: Mapping[str, Any]) -> None:
    """Write the condition of a task so that kfp.local resolves it.

    kfp.local takes each output of a step for the one named `Output`, unless a second hyphen precedes the output's
    name. It skips the task without an error if it finds no value.
    """
    policy = task.get("triggerPolicy", {})
    if "condition" not in policy:
        return
    for name, value in task["inputs"]["parameters"].items():
        if made := value.get("taskOutputParameter"):
            channel = f"pipelinechannel--{made['producerTask']}--{made['outputParameterKey']}"
            policy["condition"] = policy["condition"].replace(f"'{name}'", f"'{channel}'")


if __name__ == "__main__":
    sys.exit(main())
