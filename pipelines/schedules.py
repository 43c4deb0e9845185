"""Creates, updates and deletes the recurring run of a model line, and writes the CronJob's entry that does the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import kfp_server_api

from pipelines.client import Api, RemoteError
from pipelines.runs import Job
from salun_core.digest import digest_json
from salun_core.errors import UsageError

_FIELD = re.compile(r"[\dA-Za-z*?,/LW#-]+")


def check_cron(cron: str) -> str:
    """Return a cron expression of six fields, seconds first, unchanged.

    Raises:
        UsageError: it has another number of fields, or a character that no cron expression has.
    """
    fields = cron.split()
    if len(fields) == 6 and all(map(_FIELD.fullmatch, fields)):  # noqa: PLR2004
        return cron
    near = f"did you mean '0 {cron}'? " if len(fields) == 5 else ""  # noqa: PLR2004
    raise UsageError(
        f"{cron!r} is not a schedule of a recurring run",
        f"it has {len(fields)} fields; six are needed: second minute hour day month weekday",
        f"{near}for example --cron '0 0 2 * * *'",
    )


def cronjob_entry(cron: str, pipeline: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a CronJob that submits the same: its five-field schedule and the container's arguments.

    Args:
        cron: six fields, seconds first.
        pipeline: its name.
        words: the parameters as on the command line.

    Raises:
        UsageError: the schedule needs seconds, which a CronJob does not have.
    """
    seconds, *five = check_cron(cron).split()
    if seconds != "0":
        raise UsageError(f"{cron!r} is not a schedule of a CronJob", "a CronJob has no seconds", "let it begin with 0")
    return {
        "schedule": " ".join(five).replace("?", "*"),
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "args": ["python", "-m", "pipelines", "submit", "--pipeline", pipeline, "--no-wait", *words],
    }


def put_schedule(api: Api, job: Job, cron: str) -> tuple[str, str]:
    """Create or update the recurring run of a job.

    The new one is created disabled, the old ones are deleted, and then the new one is enabled, so that two are never
    enabled at once. An interruption leaves the old one and a disabled new one, or only the disabled new one; the next
    call finds the new one and completes the update.

    Returns:
        The id, and what was done: created, updated or unchanged.
    """
    service, fields = api.client.recurring_runs, job.fields(api)
    version = fields["pipeline_version_reference"].pipeline_version_id
    key = digest_json([version, dict(job.parameters), cron, job.account])
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=job.name,
        description=f"{job.package.description} schedule sha256:{key}",
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron)),
        max_concurrency="1",  # a second sweep does not help a late one
        no_catchup=True,
        mode="DISABLE",
        **fields,
    )
    there = find_schedules(api, job)
    kept, _ = api.ensure(
        "create recurringruns",
        lambda: next((item for item in find_schedules(api, job) if item.description == body.description), None),
        lambda **more: service.recurring_run_service_create_recurring_run(body, **more),
    )
    identity, enabled = str(kept.recurring_run_id), kept.status == "ENABLED"
    others = [item for item in there if item.recurring_run_id != identity]
    _delete(api, others)
    if not enabled:
        enable = service.recurring_run_service_enable_recurring_run
        api.ensure("enable recurringruns", lambda: None, lambda **more: enable(identity, **more))
    return identity, "created" if not there else "unchanged" if enabled and not others else "updated"


def delete_schedule(api: Api, job: Job) -> int:
    """Delete the recurring runs of a job, and return how many there were."""
    found = find_schedules(api, job)
    _delete(api, found)
    return len(found)


def find_schedules(api: Api, job: Job) -> list[Any]:
    """Return the recurring runs of a job's pipeline and line; there are two only after an interrupted update."""
    found = api.find("experiments", job.experiment, **api.scope)
    return list(api.every("recurring_runs", job.name, experiment_id=found.experiment_id)) if found else []


def _delete(api: Api, items: list[Any]) -> None:
    delete = api.client.recurring_runs.recurring_run_service_delete_recurring_run
    for item in items:
        try:
            api.call("delete recurringruns", delete, item.recurring_run_id)
        except RemoteError as error:
            if error.status != 404:  # noqa: PLR2004 - gone: the reply to the first attempt was lost
                raise
