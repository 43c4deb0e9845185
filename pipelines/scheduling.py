"""Keeps the recurring run of a sweep as it is wanted, and writes the CronJob's entry that does the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kfp_server_api

from pipelines.client import Api
from pipelines.packages import Package
from pipelines.registering import Registered
from salun_core.errors import UsageError

_FIELD = re.compile(r"[\dA-Za-z*?,/LW#-]+")
_SIX = 6


@dataclass(frozen=True)
class Schedule:
    """What runs when.

    Args:
        package: the compiled pipeline.
        parameters: the run form of each run.
        cron: six fields, seconds first.
        account: the ServiceAccount of the pods; None leaves it to Kubeflow.
    """

    package: Package
    parameters: Mapping[str, Any]
    cron: str
    account: str | None = None

    @property
    def name(self) -> str:
        """The recurring run's name; there is one for each pipeline and model line."""
        return f"{self.package.name} {self.parameters['model_line']}"


def check_cron(cron: str) -> str:
    """Return a cron expression of six fields unchanged.

    Raises:
        UsageError: it has another number of fields, or a strange character.
    """
    fields = cron.split()
    if len(fields) == _SIX and all(map(_FIELD.fullmatch, fields)):
        return cron
    near = f"did you mean '0 {cron}'? " if len(fields) == _SIX - 1 else ""
    raise UsageError(
        f"{cron!r} is no schedule of a recurring run",
        f"it has {len(fields)} fields, and there are six: second minute hour day month weekday",
        f"{near}for example --cron '0 0 2 * * *'",
    )


def cronjob_entry(cron: str, pipeline: str, words: Sequence[str]) -> dict[str, Any]:
    """Return what a CronJob needs to submit the same: its five-field schedule and the container's arguments.

    Args:
        cron: six fields, seconds first.
        pipeline: its name.
        words: the parameters as they stand on the command line.

    Raises:
        UsageError: the schedule needs seconds, which a CronJob does not have.
    """
    seconds, *five = check_cron(cron).split()
    if seconds != "0":
        raise UsageError(f"{cron!r} is no schedule of a CronJob", "a CronJob knows no seconds", "let it begin with 0")
    args = ["python", "-m", "pipelines", "submit", "--pipeline", pipeline, "--no-wait", *words]
    return {
        "schedule": " ".join(five).replace("?", "*"),
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "args": args,
    }


def put_schedule(api: Api, schedule: Schedule, version: Registered, experiment: str) -> tuple[str, str]:
    """Make the recurring run what is wanted, by the fewest steps; a call that broke off is mended by the next.

    The new one is made disabled, the old ones are deleted, and then the new one is enabled: two never run at once.

    Args:
        api: where to.
        schedule: what is wanted.
        version: of the pipeline.
        experiment: that the runs are shown in.

    Returns:
        The id, and what was done: created, updated or unchanged.

    Raises:
        RemoteError: Kubeflow fails or refuses.
    """
    service = api.client.recurring_runs
    body = _body(schedule, version, str(api.experiment(experiment)))
    there = find_schedules(api, schedule.name, experiment)
    same = next((item for item in there if _same(item, body)), None)
    was_on = same is not None and same.status == "ENABLED"
    kept, _ = api.ensure(
        "create recurringruns",
        lambda: next((item for item in find_schedules(api, schedule.name, experiment) if _same(item, body)), None),
        lambda **more: service.recurring_run_service_create_recurring_run(body, **more),
    )
    others = [item for item in there if item.recurring_run_id != kept.recurring_run_id]
    _delete(api, others)
    if not was_on:
        api.call("enable recurringruns", service.recurring_run_service_enable_recurring_run, kept.recurring_run_id)
    done = "created" if not there else "unchanged" if was_on and not others else "updated"
    return str(kept.recurring_run_id), done


def delete_schedule(api: Api, name: str, experiment: str) -> int:
    """Delete the recurring runs of a name; the runs that they started go on.

    Args:
        api: where.
        name: of the recurring run.
        experiment: that it belongs to.

    Returns:
        How many there were.

    Raises:
        RemoteError: Kubeflow fails or refuses.
    """
    found = find_schedules(api, name, experiment)
    _delete(api, found)
    return len(found)


def find_schedules(api: Api, name: str, experiment: str) -> list[Any]:
    """Return the recurring runs of a name; there is more than one only after an update that broke off."""
    experiment_id = api.experiment(experiment, make=False)
    if experiment_id is None:
        return []
    listing = api.client.recurring_runs.recurring_run_service_list_recurring_runs
    return list(api.every("list recurringruns", listing, "recurring_runs", name=name, experiment_id=experiment_id))


def _delete(api: Api, items: list[Any]) -> None:
    for item in items:
        api.ensure_gone(
            "delete recurringruns",
            api.client.recurring_runs.recurring_run_service_delete_recurring_run,
            item.recurring_run_id,
        )


def _body(schedule: Schedule, version: Registered, experiment_id: str) -> Any:  # noqa: ANN401 - kfp's model
    return kfp_server_api.V2beta1RecurringRun(
        display_name=schedule.name,
        description=f"{schedule.package.description} IR sha256:{schedule.package.digest}",
        experiment_id=experiment_id,
        pipeline_version_reference=version.reference,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=dict(schedule.parameters)),
        service_account=schedule.account,
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=schedule.cron)),
        max_concurrency="1",  # a sweep that is late is not helped by a second one
        no_catchup=True,
        mode="DISABLE",
    )


def _same(item: Any, body: Any) -> bool:  # noqa: ANN401 - kfp's models
    """Return whether a recurring run does what the body wants, whether it is enabled or not."""
    return _wanted(item) == _wanted(body) and (not body.service_account or item.service_account == body.service_account)


def _wanted(item: Any) -> tuple[object, ...]:  # noqa: ANN401 - kfp's model
    reference, trigger, config = item.pipeline_version_reference, item.trigger, item.runtime_config
    return (
        reference and reference.pipeline_version_id,
        trigger and trigger.cron_schedule and trigger.cron_schedule.cron,
        (config and config.parameters) or {},
        str(item.max_concurrency),
        bool(item.no_catchup),
    )
