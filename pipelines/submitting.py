"""Submits a run once for a piece of work, and follows it step by step to its result."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import kfp_server_api

from pipelines.client import Api, RemoteError
from pipelines.packages import SHORT, Package
from pipelines.registering import Registered
from salun_core import errors
from salun_core.digest import digest_json

EXPERIMENT = "salun"
SETTLING = 1.2  # seconds; Kubeflow notes the whole second in which a run was made
TIMED_OUT = 124
DONE = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
LOST = {"FAILED", "SKIPPED", "CANCELED"}
_ATTEMPT = re.compile(r"\(\d+\)$")
_NAMED_ERROR = re.compile(r"\b([A-Z]\w*Error)\b")
_SLOTS = {"hour": "%Y-%m-%dT%HZ", "day": "%Y-%m-%d"}


@dataclass(frozen=True)
class Work:
    """A piece of work that is done by one run.

    Args:
        package: the compiled pipeline.
        parameters: the run form.
        slot: tells equal work apart, such as the hour of a sweep; empty where equal work is done once for all.
    """

    package: Package
    parameters: Mapping[str, Any]
    slot: str = ""

    @property
    def key(self) -> str:
        """SHA-256 of everything that makes it this work."""
        return digest_json([self.package.name, self.package.digest, dict(self.parameters), self.slot])

    @property
    def name(self) -> str:
        """The run's name, which carries the key."""
        words = (self.package.name, str(self.parameters.get("model_line", "")), self.slot, self.key[:SHORT])
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Submitted:
    """A run that does the work.

    Args:
        run_id: its id.
        url: its page.
        made: whether it was made now; else an equal one was there.
    """

    run_id: str
    url: str
    made: bool


@dataclass(frozen=True)
class Result:
    """Where a run stands.

    Args:
        run_id: its id.
        name: its name.
        state: as Kubeflow says it.
        url: its page.
        exit_code: 0 succeeded or not yet finished, 3 gate refused, 4 stale parent, 5 integrity, 1 anything else.
        error: what the failed step says.
        steps: the state of each step that was reached.
    """

    run_id: str
    name: str
    state: str
    url: str
    exit_code: int = 0
    error: str = ""
    steps: dict[str, str] = field(default_factory=dict)


class WaitedTooLong(errors.SalunError):  # noqa: N818 - says what it is
    """The run had not finished in time; it goes on (exit 124)."""

    exit_code = TIMED_OUT


def slot_of(text: str, now: datetime | None = None) -> str:
    """Return the slot that a word means: the current `hour` or `day` in UTC, or the word itself."""
    pattern = _SLOTS.get(text)
    return (now or datetime.now(UTC)).strftime(pattern) if pattern else text


def submit(api: Api, work: Work, version: Registered, experiment: str, account: str | None = None) -> Submitted:
    """Submit a run, unless one of the same key goes on or succeeded.

    Two submitters that race agree on the older run; the other one is stopped before it has done anything.

    Args:
        api: where to.
        work: what is to be done.
        version: of the pipeline.
        experiment: that the run is shown in.
        account: the ServiceAccount of the pods; else Kubeflow's own choice.

    Returns:
        The run.

    Raises:
        RemoteError: Kubeflow fails or refuses.
        UsageError: Kubeflow calls the run form wrong.
    """
    experiment_id = str(api.experiment(experiment))
    body = kfp_server_api.V2beta1Run(
        display_name=work.name,
        description=f"work key sha256:{work.key}",
        experiment_id=experiment_id,
        pipeline_version_reference=version.reference,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(work.parameters)),
        service_account=account,
    )
    service = api.client.runs
    found, made = api.ensure(
        "create runs",
        lambda: _first(api, experiment_id, work.name),
        lambda **more: service.run_service_create_run(body, **more),
    )
    mine = str(found.run_id)
    if made:
        time.sleep(SETTLING)
        first = _first(api, experiment_id, work.name)
        if first is not None and first.run_id != mine:
            api.call("terminate runs", service.run_service_terminate_run, mine)
            mine, made = str(first.run_id), False
    return Submitted(mine, api.link("runs", mine), made)


def _first(api: Api, experiment_id: str, name: str) -> Any:  # noqa: ANN401 - kfp's model
    """Return the oldest run of a name that is not lost, or None."""
    listing = api.client.runs.run_service_list_runs
    runs = api.every("list runs", listing, "runs", name=name, experiment_id=experiment_id)
    open_runs = [run for run in runs if run.state not in LOST | {"CANCELING"}]
    return min(open_runs, key=lambda run: (run.created_at, run.run_id), default=None)


def follow(
    api: Api, run_id: str, steps: list[str], say: Callable[[str], None], *, timeout: float, poll: float
) -> Result:
    """Wait for the end of a run, and say when a step changes its state.

    Args:
        api: where it runs.
        run_id: of the run.
        steps: names of the pipeline's steps; Kubeflow's own tasks are not told.
        say: called with a line.
        timeout: seconds.
        poll: seconds between two looks.

    Returns:
        The result.

    Raises:
        WaitedTooLong: it has not ended in time.
        RemoteError: Kubeflow can no longer be asked; the run goes on.
    """
    deadline, told = time.monotonic() + timeout, dict[str, str]()
    while True:
        result = look(api, run_id, steps)
        for step, state in result.steps.items():
            if told.get(step) != state:
                say(f"{step:<18} {state.lower()}")
        told = result.steps
        if result.state in DONE:
            return result
        left = deadline - time.monotonic()
        if left <= 0:
            remedy = f"`python -m pipelines status {run_id}` tells more, or give a longer --timeout"
            raise WaitedTooLong(f"run {run_id} is {result.state.lower()}", f"{timeout:g} s have passed", remedy)
        time.sleep(min(poll, left))


def look(api: Api, run_id: str, steps: list[str] | None = None) -> Result:
    """Say where a run stands.

    Args:
        api: where it runs.
        run_id: of the run.
        steps: names of the pipeline's steps; None tells every task.

    Returns:
        The result so far.

    Raises:
        RemoteError: there is no such run, or Kubeflow fails or refuses.
    """
    run = api.call("get runs", api.client.runs.run_service_get_run, run_id)
    state = str(run.state or "PENDING")
    details = run.run_details.task_details or [] if run.run_details else []
    states, failures = dict[str, str](), list[str]()
    for task in sorted(details, key=lambda task: str(task.create_time or "")):
        name = _ATTEMPT.sub("", str(task.display_name))
        if task.state == "FAILED" and task.error and task.error.message:
            failures.append(f"{name}: {task.error.message}")
        if task.state and (steps is None or name in steps):
            states[name] = str(task.state)
    if run.error and run.error.message:
        failures.append(str(run.error.message))
    lost = state in LOST
    error = _told(failures, states) if lost else ""
    code = _exit_code(failures) if lost else 0
    return Result(run_id, str(run.display_name), state, api.link("runs", run_id), code, error, states)


def latest(api: Api, experiment: str, number: int) -> list[Result]:
    """Return the newest runs of an experiment, newest first.

    Args:
        api: where they run.
        experiment: its name.
        number: of runs, at most.

    Raises:
        RemoteError: there is no such experiment, or Kubeflow fails or refuses.
    """
    experiment_id = api.experiment(experiment, make=False)
    if experiment_id is None:
        raise RemoteError(f"there is no experiment {experiment}", "nothing was submitted to it", "check --namespace")
    answer = api.call(
        "list runs",
        api.client.runs.run_service_list_runs,
        experiment_id=experiment_id,
        sort_by="created_at desc",
        page_size=number,
    )
    return [
        Result(str(run.run_id), str(run.display_name), str(run.state or "PENDING"), api.link("runs", run.run_id))
        for run in answer.runs or []
    ]


def _told(failures: list[str], states: Mapping[str, str]) -> str:
    """Return what to say of a lost run: what the failures say, or which steps failed."""
    named = [text for text in failures if _NAMED_ERROR.search(text)]
    failed = [name for name, state in states.items() if state == "FAILED"]
    text = (named or failures or [f"{', '.join(failed) or 'no step'} failed and said nothing"])[0]
    return " ".join(text.split())[:400]


def _exit_code(failures: list[str]) -> int:
    """Return the exit code of the first of the project's errors that a failure names, else 1."""
    for name in _NAMED_ERROR.findall("\n".join(failures)):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, errors.SalunError):
            return kind.exit_code
    return 1
