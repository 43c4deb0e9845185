"""A step in a pod: inputs and outputs by reference, a verdict in place of an exit code.

`in_step` does the work of one step, and around it

1. reads the references of the steps before, and passes on at once if the run has ended (`Kind.NOTHING`);
2. notes in the run's outcome that the step works, and renews the lease of the model line while it does;
3. turns a verdict (wrong input, refused, stale parent, damaged) into the run's outcome, and succeeds;
4. repeats a fault that may pass (store, device memory), and ends with one line on standard error if it stays.

Kubeflow repeats a step whose pod was lost, Argo's stock settings do not repeat one that failed, and a person can press
Retry. Every step may therefore run again from its start: what it writes has the digest in its key, or a condition.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeVar

from salun_core.errors import (
    ConflictError,
    DataError,
    DeviceMemoryError,
    GateRefusedError,
    IntegrityError,
    LineHeldError,
    RunSettledError,
    SalunError,
    StoreError,
    StoreUnreachableError,
    UsageError,
)
from salun_core.pods.reference import Kind, Reference, Scratch, read_reference
from salun_core.registry.lookup import ancestry
from salun_core.steps.outcome import REPORT, OutcomeRecord, RunState, new_outcome, read_outcome, write_outcome
from salun_core.storage import open_store
from salun_core.storage.keys import check_id, run_key
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.heartbeat import lease_renewed
from salun_core.telemetry.logs import described, get_logger, run_bound

PAUSES = (5.0, 15.0, 45.0, 120.0, 240.0)
"""Seconds between the attempts of a step after a fault that may pass; about seven minutes, shorter than a lease."""
T = TypeVar("T")
Work = Callable[[Path, list[Reference]], Reference]


@dataclass(frozen=True)
class Pod:
    """A run, as each of its pods knows it; `store_uri` is `s3://bucket/prefix`."""

    store_uri: str
    model_line: str
    run: str

    @cached_property
    def store(self) -> S3Store:
        """The open store."""
        return open_store(self.store_uri)

    @cached_property
    def scratch(self) -> Scratch:
        """The files of the run."""
        return Scratch(self.store, self.run)

    def outcome(self, state: RunState, text: str, **fields: Any) -> OutcomeRecord:  # noqa: ANN401 - of the record
        """Return an outcome of this run."""
        return new_outcome(self.run, self.model_line, state, text, **fields)

    def check(self) -> None:
        """Check the form of the addresses; UsageError if one is wrong."""
        check_id("model line", self.model_line)
        check_id("run", self.run)

    def published(self) -> str | None:
        """Return the version that the run published and that HEAD still descends from, or None."""
        found = (item for item in ancestry(self.store, self.model_line) if item.manifest.run == self.run)
        return next((item.digest for item in found), None)

    def report_address(self) -> str:
        """Return the address of the run's report in the store; empty without one."""
        key = run_key(self.run, REPORT)
        return f"{self.store.uri}/{key}" if next(iter(self.store.list(key)), None) else ""


class Hold(StrEnum):
    """Whether a step works only while its run holds the model line."""

    REQUIRED = "required"
    UNTIL_PUBLISHED = "until published"
    NONE = "none"


def in_step(
    pod: Pod, name: str, paths: Sequence[str], work: Work, *, hold: Hold = Hold.REQUIRED, again: bool = False
) -> Reference:
    """Do a step in a temporary folder, and return what it made; see the module for what surrounds it.

    `hold` is whether the step needs the lease of the model line, which is renewed while it works. A step that takes the
    lease itself needs none; one that may run again after the run was settled needs it until it has published.

    `again` works although the run has its outcome: for the step that makes the artifacts of the verdict, whose pod may
    have been lost after the verdict was written. Once the exit handler deleted the run's files, as before a Retry from
    the browser, it passes on too.
    """

    def attempt() -> Reference:
        try:
            pod.check()
            given = [read_reference(path) for path in paths]
            there, passed_on = read_outcome(pod.store, pod.run), any(item.kind is Kind.NOTHING for item in given)
            ended = there is not None and there.final
            if passed_on and not ended:  # or somebody who can write to Kubeflow's store could skip the gate
                raise IntegrityError(
                    "an artifact says that the run has ended", "the run has no outcome", "submit a new run"
                )
            if there is not None and ended and (passed_on or not (again and pod.scratch.exists())):
                return nothing(there.state).model_copy(update={"made_from": given})
            with ExitStack() as stack:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="salun-step-")))
                _hold(pod, hold, stack)
                write_outcome(pod.store, pod.outcome(RunState.RUNNING, f"{name} works", step=name))
                return work(folder, given)
        except (StoreError, DeviceMemoryError):
            raise  # a fault: whether the step can be done is not known
        except SalunError as error:
            return _verdict(pod, name, error)

    with run_bound(pod.run):  # each line of the log carries the run
        return patiently(pod, name, attempt)


def _hold(pod: Pod, hold: Hold, stack: ExitStack) -> None:
    if hold is Hold.NONE:
        return
    try:
        stack.enter_context(lease_renewed(pod.store, pod.model_line, pod.run))
    except RunSettledError:
        if hold is Hold.REQUIRED or pod.published() is None:
            raise


def patiently(pod: Pod, name: str, attempt: Callable[[], T]) -> T:
    """Repeat a fault that may pass, with pauses; any other fault, and one that stays, ends the process."""
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except Exception as error:  # noqa: BLE001 - the last line of a pod's log must say what happened
            if pause is None or not _may_pass(error):
                end_process(pod, name, error)
            get_logger().warning("step_repeated", step=name, error=type(error).__name__, seconds=pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or ends")


def _may_pass(error: BaseException) -> bool:
    """Whether the same attempt may succeed later: the store answers again, or others give back the device's memory."""
    return isinstance(error, StoreUnreachableError | DeviceMemoryError | ConnectionError)


def end_process(pod: Pod, name: str, error: Exception) -> NoReturn:
    """End the process after a fault: one line on standard error, and the run's outcome names it if the store can."""
    text = str(error.for_pods()) if isinstance(error, SalunError) else _unexpected(error)
    if not isinstance(error, SalunError):
        get_logger().error("internal_error", step=name, **described(error))
    try:
        write_outcome(pod.store, pod.outcome(RunState.RUNNING, f"{name} failed: {text}", step=name, fault=True))
    except (SalunError, OSError, ValueError):  # the store or the run's address is the fault: the exit handler says so
        get_logger().warning("outcome_not_written", step=name)
    print(f"Error: {name} failed: {text}", file=sys.stderr, flush=True)
    raise SystemExit(getattr(error, "exit_code", 1)) from None


def _unexpected(error: Exception) -> str:
    """Describe an unexpected error without its message, which may hold a sample id, and without a file's name."""
    where = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    at = f" in {Path(where.filename).name}, line {where.lineno}" if where else ""
    reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{at}{reason}"


def nothing(state: RunState) -> Reference:
    """Return what a step passes on if the run has ended."""
    return Reference(kind=Kind.NOTHING, facts={"state": str(state)})


def _verdict(pod: Pod, step: str, error: SalunError) -> Reference:
    """Write the outcome of a run that a step ended."""
    told = error.for_pods()
    try:
        outcome = pod.outcome(
            _state_of(error),
            f"{told.what}: {told.why}" if told.why else told.what,
            next=told.remedy,
            step=step,
            code=error.exit_code,
            report=pod.report_address(),
        )
    except (UsageError, ValueError):  # the address of the run is what is wrong: its outcome has no place
        end_process(pod, step, error)
    get_logger().warning("run_ended", step=step, state=outcome.state, error=type(error).__name__)
    return nothing(write_outcome(pod.store, outcome).state)


def _state_of(error: SalunError) -> RunState:
    if isinstance(error, GateRefusedError):
        return RunState.REFUSED
    if isinstance(error, IntegrityError):
        return RunState.DAMAGED
    if isinstance(error, UsageError | DataError):
        return RunState.WRONG_INPUT
    if isinstance(error, LineHeldError):
        return RunState.LINE_HELD
    if isinstance(error, RunSettledError):
        return RunState.SETTLED_BEFORE
    return RunState.STALE_PARENT if isinstance(error, ConflictError) else RunState.FAILED
