"""Creates, updates and deletes the recurring run of a model line, and writes the CronJob's entry that does the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import kfp_server_api

from pipelines.client import Api, RemoteError
from pipelines.cron import Cron, parse_cron
from pipelines.runs import Job
from salun_core.digest import digest_json
from salun_core.errors import UsageError

ORPHAN = "ORPHAN"  # without it Kubernetes deletes the runs of a recurring run with it, also one that works
SETTLED = timedelta(seconds=30)  # after a slot: Kubeflow's scheduler looks about every ten seconds
QUIET = timedelta(seconds=60)  # before a slot: long enough for the calls of an update
TRIES = 3  # a schedule with a slot every minute has no quiet moment


def cronjob_entry(cron: str, pipeline: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a CronJob that submits the same: its five-field schedule and the container's arguments.

    `cron` has six fields, seconds first; UsageError if it needs seconds, which a CronJob does not have.
    """
    seconds, *five = parse_cron(cron).text.split()
    if seconds != "0":
        raise UsageError(f"{cron!r} is not a schedule of a CronJob", "a CronJob has no seconds", "let it begin with 0")
    return {
        "schedule": " ".join(five).replace("?", "*"),
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "args": ["python", "-m", "pipelines", "submit", "--pipeline", pipeline, "--no-wait", *words],
    }


def put_schedule(api: Api, job: Job, cron: str, progress: Callable[[str], None] = lambda line: None) -> tuple[str, str]:
    """Create or update the recurring run of a job; returns its id, and created, updated or unchanged.

    A run that works is never touched. An update waits for a moment in which no slot of the old and of the new schedule
    is near; `progress` gets a line before a pause. Then it creates the new one, enabled, and deletes the old ones. What
    an interruption leaves:

    - before the new one exists: the old one. Nothing happened.
    - between the two: both, enabled. No slot is lost; a slot of both starts two runs, and the lease of the model line
      leaves the second one without work. The next call finds the new one and deletes the others.
    - after a deletion whose reply was lost: the new one.

    The same holds for a schedule with a slot every minute, which has no quiet moment: the update takes place
    nevertheless. A slot that the old one holds back because its run still works is dropped with it. If the schedule
    exists and is disabled, it is enabled, and the old ones are deleted afterwards.
    """
    schedule = parse_cron(cron)
    service, fields = api.client.recurring_runs, job.fields(api)
    version = fields["pipeline_version_reference"].pipeline_version_id
    key = digest_json([version, dict(job.parameters), cron, job.account])
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=job.name,
        description=f"{job.package.description} schedule sha256:{key}",
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron)),
        max_concurrency="1",  # a second sweep does not help a late one
        no_catchup=True,
        mode="ENABLE",
        **fields,
    )
    there = find_schedules(api, job)
    if any(item.description != body.description for item in there):
        _await_quiet([schedule, *_crons(there)], progress)
    kept, _ = api.ensure(
        "create recurringruns",
        lambda: next((item for item in find_schedules(api, job) if item.description == body.description), None),
        lambda **more: service.recurring_run_service_create_recurring_run(body, **more),
    )
    identity, enabled = str(kept.recurring_run_id), kept.status == "ENABLED"
    if not enabled:
        enable = service.recurring_run_service_enable_recurring_run
        api.ensure("enable recurringruns", lambda: None, lambda **more: enable(identity, **more))
    others = [item for item in there if item.recurring_run_id != identity]
    _delete(api, others)
    return identity, "created" if not there else "unchanged" if enabled and not others else "updated"


def _await_quiet(schedules: list[Cron], progress: Callable[[str], None]) -> None:
    """Wait until no slot has just begun or is about to begin."""
    for _ in range(TRIES):
        now = datetime.now(UTC)
        near = [slot for one in schedules for slot in one.slots(now - SETTLED, now + QUIET)]
        if not near:
            return
        pause = max(near) + SETTLED - now + timedelta(seconds=1)
        progress(f"A slot is near: the update waits {pause.total_seconds():.0f} s, so that it starts one run")
        time.sleep(pause.total_seconds())


def _crons(items: list[Any]) -> list[Cron]:
    """Return the schedules of recurring runs; what was made by hand may have none, or one that is not valid."""
    found = []
    for item in items:
        try:
            found.append(parse_cron(str(item.trigger.cron_schedule.cron)))
        except (AttributeError, UsageError):
            continue
    return found


def delete_schedule(api: Api, job: Job) -> int:
    """Delete the recurring runs of a job, but not the runs that they started, and return how many there were."""
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
            api.call("delete recurringruns", delete, item.recurring_run_id, propagation_policy=ORPHAN)
        except RemoteError as error:
            if error.status != 404:  # noqa: PLR2004 - gone: the reply to the first attempt was lost
                raise
