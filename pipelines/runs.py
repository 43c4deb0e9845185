"""Registers pipelines, submits a run once for a piece of work, and follows it step by step to its result.

Functions that call Kubeflow raise the errors of `pipelines.client.Api`.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api

from pipelines.client import Api, RemoteError
from pipelines.packages import SHORT, Package
from salun_core.digest import digest_json
from salun_core.errors import SalunError, exit_code_of

SETTLING = 1.2  # seconds; Kubeflow stores the creation time of a run in whole seconds
LOST = {"FAILED", "SKIPPED", "CANCELED"}
DONE = {"SUCCEEDED", *LOST}
_ATTEMPT = re.compile(r"\(\d+\)$")
_NAMED_ERROR = re.compile(r"\b([A-Z]\w*Error)\b")
_SLOTS = {"hour": "%Y-%m-%dT%HZ", "day": "%Y-%m-%d"}


@dataclass(frozen=True)
class Job:
    """What a run does, at once or on a schedule.

    Args:
        package: the compiled pipeline.
        parameters: the run form.
        experiment: under which Kubeflow lists the runs.
        account: the ServiceAccount of the pods; None leaves it to Kubeflow.
    """

    package: Package
    parameters: Mapping[str, Any]
    experiment: str = "salun"
    account: str | None = None

    @property
    def name(self) -> str:
        """Pipeline and model line."""
        return f"{self.package.name} {self.parameters.get('model_line', '')}".strip()

    def fields(self, api: Api) -> dict[str, Any]:
        """Register the pipeline and return the fields that a run and a recurring run have in common."""
        version, _ = register(api, self.package)
        return {
            "experiment_id": api.experiment(self.experiment),
            "pipeline_version_reference": kfp_server_api.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
            ),
            "runtime_config": kfp_server_api.V2beta1RuntimeConfig(parameters=dict(self.parameters)),
            "service_account": self.account,
        }


@dataclass(frozen=True)
class Result:
    """The state of a run.

    Args:
        run_id: its id.
        name: its name.
        state: in Kubeflow's words.
        url: its page.
        exit_code: 0 succeeded or not yet finished, 3 gate refused, 4 stale parent, 5 integrity, 1 anything else.
        error: the message of the failed step.
        steps: the state of each step that was reached.
    """

    run_id: str
    name: str
    state: str
    url: str
    exit_code: int = 0
    error: str = ""
    steps: dict[str, str] = field(default_factory=dict)


class WaitTimeoutError(SalunError):
    """The run did not finish in time; it continues (exit 124)."""

    exit_code = 124


def register(api: Api, package: Package) -> tuple[Any, bool]:
    """Upload a pipeline, unless a version with the same digest exists.

    Returns:
        The version, as kfp's model, and whether it was uploaded now.
    """
    body = kfp_server_api.V2beta1Pipeline(
        display_name=package.name, description=package.description, namespace=api.namespace
    )
    create = api.client.pipelines.pipeline_service_create_pipeline
    pipeline, _ = api.ensure(
        "create pipelines",
        lambda: api.find("pipelines", package.name, **api.scope),
        lambda **more: create(body, **more),
    )
    scope = {"pipeline_id": str(pipeline.pipeline_id)}
    with tempfile.TemporaryDirectory(prefix="salun-register-") as folder:
        path = Path(folder) / package.path.name
        path.write_text(package.text, encoding="utf-8")
        return api.ensure(
            "create pipelines",
            lambda: api.find("pipeline_versions", package.version, **scope),
            lambda **more: api.client.pipeline_uploads.upload_pipeline_version(
                str(path),
                name=package.version,
                pipelineid=scope["pipeline_id"],
                description=f"{package.description} IR sha256:{package.digest}",
                **more,
            ),
        )


def slot_of(text: str, now: datetime | None = None) -> str:
    """Return the slot that a word stands for: the current `hour` or `day` in UTC, or the word itself."""
    pattern = _SLOTS.get(text)
    return (now or datetime.now(UTC)).strftime(pattern) if pattern else text


def submit(api: Api, job: Job, slot: str = "") -> tuple[str, bool]:
    """Submit a run, unless one with the same key is active or succeeded.

    Two submitters that find nothing both create a run. Each one looks again after the second in which both were
    created, and the older run wins: the other submitter terminates its own before a step has started. If a submitter
    dies in between, two runs remain, and the lease of the model line lets only one of them work.

    Args:
        api: where to.
        job: what the run does.
        slot: distinguishes equal work, such as the hour of a sweep; empty if equal work is done only once.

    Returns:
        The id of the run, and whether it was created now; else an equal one existed.
    """
    key = digest_json([job.package.name, job.package.digest, dict(job.parameters), slot])
    name = " ".join(word for word in (job.name, slot, key[:SHORT]) if word)
    fields, service = job.fields(api), api.client.runs
    body = kfp_server_api.V2beta1Run(display_name=name, description=f"work key sha256:{key}", **fields)
    found, made = api.ensure(
        "create runs",
        lambda: _first(api, fields["experiment_id"], name),
        lambda **more: service.run_service_create_run(body, **more),
    )
    mine = str(found.run_id)
    if not made:
        return mine, False
    time.sleep(SETTLING)
    first = _first(api, fields["experiment_id"], name)
    if first is None or first.run_id == mine:
        return mine, True
    api.ensure("terminate runs", lambda: None, lambda **more: service.run_service_terminate_run(mine, **more))
    return str(first.run_id), False


def _first(api: Api, experiment_id: str, name: str) -> Any:  # noqa: ANN401 - kfp's model
    """Return the oldest run of a name that is active or succeeded, or None."""
    runs = api.every("runs", name, experiment_id=experiment_id)
    kept = [run for run in runs if run.state not in LOST | {"CANCELING"}]
    return min(kept, key=lambda run: (run.created_at, run.run_id), default=None)


def follow(
    api: Api, run_id: str, steps: list[str], progress: Callable[[str], None], *, timeout: float, poll: float
) -> Result:
    """Wait for the end of a run, and report each change of a step's state.

    Args:
        api: where it runs.
        run_id: of the run.
        steps: names of the pipeline's steps; Kubeflow's own tasks are not reported.
        progress: called with a line.
        timeout: seconds to wait, at most.
        poll: seconds between two looks.

    Raises:
        WaitTimeoutError: it has not ended in time.
    """
    deadline, known = time.monotonic() + timeout, dict[str, str]()
    while True:
        result = look(api, run_id, steps)
        for step, state in result.steps.items():
            if known.get(step) != state:
                progress(f"{step:<18} {state.lower()}")
        known = result.steps
        if result.state in DONE:
            return result
        left = deadline - time.monotonic()
        if left <= 0:
            remedy = f"`python -m pipelines status {run_id}` shows more, or give a longer --timeout"
            raise WaitTimeoutError(f"run {run_id} is {result.state.lower()}", f"{timeout:g} s have passed", remedy)
        time.sleep(min(poll, left))


def look(api: Api, run_id: str, steps: list[str]) -> Result:
    """Return the state of a run and of those of its tasks that are steps."""
    run = api.call("get runs", api.client.runs.run_service_get_run, run_id)
    details = run.run_details.task_details or [] if run.run_details else []
    states, failures = dict[str, str](), list[str]()
    for task in sorted(details, key=lambda task: str(task.create_time or "")):
        name = _ATTEMPT.sub("", str(task.display_name))
        if task.state == "FAILED" and task.error and task.error.message:
            failures.append(f"{name}: {task.error.message}")
        if task.state and name in steps:
            states[name] = str(task.state)
    if run.error and run.error.message:
        failures.append(str(run.error.message))
    result = _result(api, run, states)
    if result.state not in LOST:
        return result
    # A failure that names an error says more than one that has only an exit code.
    named = [text for text in failures if _NAMED_ERROR.search(text)]
    failed = ", ".join(step for step, state in states.items() if state == "FAILED") or "the run"
    error = " ".join([*named, *failures, f"{failed} failed without a message"][0].split())[:400]
    codes = (exit_code_of(name) for name in _NAMED_ERROR.findall("\n".join(failures)))
    return replace(result, exit_code=next(filter(None, codes), 1), error=error)


def latest(api: Api, experiment: str, number: int) -> list[Result]:
    """Return the newest runs of an experiment, newest first.

    Raises:
        RemoteError: the experiment does not exist.
    """
    found = api.find("experiments", experiment, **api.scope)
    if found is None:
        raise RemoteError(f"experiment {experiment} does not exist", "nothing was submitted to it", "check --namespace")
    listing = api.client.runs.run_service_list_runs
    scope = {"experiment_id": found.experiment_id, "sort_by": "created_at desc", "page_size": number}
    return [_result(api, run, {}) for run in api.call("list runs", listing, **scope).runs or []]


def _result(api: Api, run: Any, steps: dict[str, str]) -> Result:  # noqa: ANN401 - kfp's model
    identity, state = str(run.run_id), str(run.state or "PENDING")
    return Result(identity, str(run.display_name), state, api.link("runs", identity), steps=steps)
