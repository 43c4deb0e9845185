"""Registers pipelines, submits a run once for a piece of work, and follows it step by step to its result.

Functions that call Kubeflow raise the errors of `pipelines.client.Api`.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api

from pipelines.client import Api, RemoteError
from pipelines.packages import SHORT, Package
from salun_core.digest import digest_json
from salun_core.errors import SalunError

SETTLING = 1.2  # seconds; Kubeflow stores the creation time of a run in whole seconds
PENDING, RUNNING, SUCCEEDED = "PENDING", "RUNNING", "SUCCEEDED"
LOST = {"FAILED", "SKIPPED", "CANCELED"}
DONE = {SUCCEEDED, *LOST}
PATIENCE = 60.0  # seconds of pending after which the reason is of interest
STANDALONE = "kubeflow"  # the namespace of the pods where Kubeflow has no namespaces for its users
_VERSIONS_PAGE = 10  # each version carries its whole specification
_ATTEMPT = re.compile(r"(.*)\((\d+)\)")
_SLOTS = {"hour": "%Y-%m-%dT%HZ", "day": "%Y-%m-%d"}


@dataclass(frozen=True)
class Job:
    """What a run does, at once or on a schedule.

    `account` is the ServiceAccount of its pods, None leaves it to Kubeflow.
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
    """The state of a run, in Kubeflow's words; `steps` are those that were reached, in the order of their start.

    `url` and `store_uri` are empty if they are not known. `pending` is seconds since the start of each task that waits
    for its pod; Kubeflow's own tasks are among them.
    """

    run_id: str
    name: str
    state: str
    url: str = ""
    namespace: str = STANDALONE
    store_uri: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    pending: dict[str, float] = field(default_factory=dict)

    @property
    def pods(self) -> str:
        """The selector of the run's pods for kubectl; Kubeflow labels them with the run's id."""
        return f"-n {self.namespace} -l pipeline/runid={self.run_id}"

    @property
    def logs(self) -> str:
        """The command that shows the end of each pod's log."""
        return f"kubectl logs {self.pods} -c main --tail 20 --prefix"

    def waiting(self) -> dict[str, str]:
        """Return a line for each task that has been pending for longer than `PATIENCE`."""
        why = f"waiting for a node. To see why: kubectl describe pod {self.pods}"
        long = {name: seconds for name, seconds in self.pending.items() if seconds >= PATIENCE}
        return {name: f"{name:<18} pending for {seconds:.0f} s: {why}" for name, seconds in long.items()}


class WaitTimeoutError(SalunError):
    """The run did not finish in time; it continues (exit 124)."""

    exit_code = 124


def register(api: Api, package: Package) -> tuple[Any, bool]:
    """Upload a pipeline, unless a version with the same digest exists; also returns whether it was uploaded now.

    A Kubeflow that keeps its pipelines in Kubernetes may have got it by `kubectl apply`. There the API shows the names
    of the objects, and no filter finds them. So the lists are read, and a version counts by its names or its digest.
    """
    body = kfp_server_api.V2beta1Pipeline(
        display_name=package.name, description=package.description, namespace=api.namespace
    )
    create = api.client.pipelines.pipeline_service_create_pipeline
    pipeline, _ = api.ensure("create pipelines", lambda: _pipeline(api, package), lambda **more: create(body, **more))
    identity = str(pipeline.pipeline_id)
    with tempfile.TemporaryDirectory(prefix="salun-register-") as folder:
        path = Path(folder) / package.path.name
        path.write_text(package.text, encoding="utf-8")
        return api.ensure(
            "create pipelines",
            lambda: _version(api, package, identity),
            lambda **more: api.client.pipeline_uploads.upload_pipeline_version(
                str(path),
                name=package.version,
                pipelineid=identity,
                description=f"{package.description} IR sha256:{package.digest}",
                **more,
            ),
        )


def register_all(api: Api, found: list[Package]) -> list[tuple[Any, bool]]:
    """Upload several pipelines at once, as `register`, in order; most of the time is the server's.

    The generated client may be shared: urllib3's pool gives each thread a connection of its own.
    """
    with ThreadPoolExecutor(max(1, len(found))) as pool:
        return list(pool.map(lambda package: register(api, package), found))


def _pipeline(api: Api, package: Package) -> Any:  # noqa: ANN401 - kfp's model
    known = api.every("pipelines", None, **api.scope)
    return next((item for item in known if package.name in (item.display_name, item.name)), None)


def _version(api: Api, package: Package, pipeline_id: str) -> Any:  # noqa: ANN401 - kfp's model
    """Return the version of a digest, or None; the newest ones are read first."""
    scope = {"pipeline_id": pipeline_id, "sort_by": "created_at desc", "page_size": _VERSIONS_PAGE}
    for item in api.every("pipeline_versions", None, **scope):
        # In Kubernetes the object of an uploaded version is called PIPELINE-VERSION; some releases show it shortened.
        names = (item.display_name, item.name, f"{package.name}-{item.name}")
        if package.version in names or package.is_in(item.pipeline_spec):
            return item
    return None


def slot_of(text: str, now: datetime | None = None) -> str:
    """Return the slot that a word stands for: the current `hour` or `day` in UTC, or the word itself."""
    pattern = _SLOTS.get(text)
    return (now or datetime.now(UTC)).strftime(pattern) if pattern else text


def submit(api: Api, job: Job, slot: str = "") -> tuple[str, bool]:
    """Submit a run, unless one with the same key is active or succeeded; also returns whether it was created now.

    Two submitters that find nothing both create a run. Each one looks again after the second in which both were
    created, and the older run wins: the other submitter terminates its own before a step has started. If a submitter
    dies in between, two runs remain, and the lease of the model line lets only one of them work.

    `slot` distinguishes equal work, such as the hour of a sweep; it is empty if equal work is done only once.
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
    try:
        api.ensure("terminate runs", lambda: None, lambda **more: service.run_service_terminate_run(mine, **more))
    except RemoteError as error:
        if error.status != 403:  # noqa: PLR2004
            raise
        raise RemoteError(
            f"run {first.run_id} was first and does this work, and the second run {mine} could not be terminated",
            f"{error.what}: {error.why}",
            f"{error.remedy}. The lease of the model line leaves the second run without work",
            status=error.status,
        ) from None
    return str(first.run_id), False


def _first(api: Api, experiment_id: str, name: str) -> Any:  # noqa: ANN401 - kfp's model
    """Return the oldest run of a name that is active or succeeded, or None."""
    runs = api.every("runs", name, experiment_id=experiment_id)
    kept = [run for run in runs if run.state not in LOST | {"CANCELING"}]
    return min(kept, key=lambda run: (run.created_at, run.run_id), default=None)


def follow(
    api: Api, run_id: str, steps: list[str], progress: Callable[[str], None], *, timeout: float, poll: float
) -> Result:
    """Wait for the end of a run, and report each change of a step's state; Kubeflow's own tasks are not reported.

    Times are in seconds; WaitTimeoutError if the run has not ended in time.
    """
    deadline, known, told = time.monotonic() + timeout, dict[str, str](), set[str]()
    while True:
        result = look(api, run_id, steps)
        for step, state in result.steps.items():
            if known.get(step) != state:
                progress(f"{step:<18} {state.lower()}")
        for task, line in result.waiting().items():
            if task not in told:
                progress(line)
        known, told = result.steps, told | set(result.waiting())
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
    tasks = _merged(details)
    states = {name: state for name, (state, _) in tasks.items() if name in steps}
    now, pending = datetime.now(UTC), dict[str, float]()
    if run.state not in DONE:
        for name, (state, start) in tasks.items():
            if state == PENDING and start:
                pending[name] = (now - start).total_seconds()
    return _result(api, run, states, pending)


def _merged(details: list[Any]) -> dict[str, tuple[str, datetime | None]]:
    """Return the state and the start of each task, in the order of their start.

    Kubeflow lists a step as a node that counts attempts, and as one node with a number for each attempt. While the
    first one is running, the last attempt says whether its pod waits. Every node has the creation time of the
    Workflow, so that only the start time orders them.
    """
    nodes: dict[str, dict[int, Any]] = {}
    for task in details:
        found = _ATTEMPT.fullmatch(str(task.display_name))
        name, number = (found[1], int(found[2])) if found else (str(task.display_name), -1)
        if task.state and task.state != "RUNTIME_STATE_UNSPECIFIED":
            nodes.setdefault(name, {})[number] = task
    merged = {}
    for name, attempts in nodes.items():
        whole, last = attempts.get(-1), attempts[max(attempts)]
        state = str((whole or last).state)
        if state == RUNNING and last.state == PENDING:
            state = PENDING
        starts = [task.start_time for task in attempts.values() if task.start_time]
        merged[name] = state, min(starts, default=None) if state != PENDING else last.start_time
    never = datetime.max.replace(tzinfo=UTC)
    return dict(sorted(merged.items(), key=lambda item: item[1][1] or never))


def latest(api: Api, experiment: str, number: int) -> list[Result]:
    """Return the newest runs of an experiment, newest first; RemoteError if the experiment does not exist."""
    found = api.find("experiments", experiment, **api.scope)
    if found is None:
        raise RemoteError(f"experiment {experiment} does not exist", "nothing was submitted to it", "check --namespace")
    listing = api.client.runs.run_service_list_runs
    scope = {"experiment_id": found.experiment_id, "sort_by": "created_at desc", "page_size": number}
    return [_result(api, run) for run in api.call("list runs", listing, **scope).runs or []]


def _result(
    api: Api,
    run: Any,  # noqa: ANN401 - kfp's model
    steps: dict[str, str] | None = None,
    pending: dict[str, float] | None = None,
) -> Result:
    identity = str(run.run_id)
    given = (run.runtime_config.parameters or {}) if run.runtime_config else {}
    return Result(
        identity,
        str(run.display_name),
        str(run.state or PENDING),
        api.link("runs", identity),
        api.namespace or STANDALONE,
        str(given.get("store_uri") or ""),
        steps or {},
        pending or {},
    )
