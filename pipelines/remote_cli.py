"""The verbs of `python -m pipelines` that talk to Kubeflow: register, submit, status, schedule."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

if TYPE_CHECKING:
    from pipelines.client import Api
    from pipelines.submitting import Result

TERMINATED = 128 + signal.SIGTERM
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}

Host = Annotated[
    str, typer.Option(envvar="KFP_ENDPOINT", help="Address of the API, such as http://ml-pipeline.kubeflow:8888.")
]
Ui = Annotated[
    str | None, typer.Option("--ui-host", envvar="KFP_UI_ENDPOINT", help="Address of the user interface, for links.")
]
Namespace = Annotated[
    str | None,
    typer.Option(envvar="KFP_NAMESPACE", help="Of the runs, on a multi-user Kubeflow; in a pod else its own."),
]
Token = Annotated[
    str | None,
    typer.Option("--token-path", envvar="KF_PIPELINES_SA_TOKEN_PATH", help="File of the token; read at each call."),
]
Pipeline = Annotated[str, typer.Option(help="unlearning, deletion-sweep or sharded-mask, or one of them with -cpu.")]
Image = Annotated[str | None, typer.Option(envvar="SALUN_IMAGE", help="Of every step; else what was compiled.")]
Experiment = Annotated[str, typer.Option(envvar="KFP_EXPERIMENT", help="That the runs are shown in.")]
Account = Annotated[
    str | None, typer.Option("--service-account", envvar="KFP_SERVICE_ACCOUNT", help="Of the run's pods.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(register)
    app.command(context_settings=FREE)(submit)
    app.command()(status)
    app.command(context_settings=FREE)(schedule)


def register(
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    pipeline: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    image: Image = None,
) -> None:
    """Upload the pipelines, each as a version named by its digest, so that the UI offers them.

    \b
    $ python -m pipelines register --host http://localhost:8888
    uploaded   salun-deletion-sweep-5f0c9b7a1d2e  http://localhost:8888/#/pipelines/details/6f2d...
    was there  salun-unlearning-77d04c3b9a10      http://localhost:8888/#/pipelines/details/0a91...
    """  # noqa: D301
    _need_client()
    from pipelines import packages, registering

    found = [packages.load_package(name, image) for name in pipeline or packages.shipped()]
    api = _connect(host, namespace, token_path, ui_host)
    for package in found:
        version = registering.register(api, package)
        state = "uploaded" if version.made else "was there"
        typer.echo(f"{state:<9}  {version.version}  {api.link('pipelines', version.pipeline_id)}")


def submit(
    context: typer.Context,
    pipeline: Pipeline = "deletion-sweep",
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    image: Image = None,
    experiment: Experiment = "salun",
    service_account: Account = None,
    slot: Annotated[
        str | None,
        typer.Option(help="Equal work of one slot runs once: hour, day, or any word. Of a sweep: hour."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run to its end.")] = True,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait, at most.")] = 86400,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Submit a run, with the pipeline's parameters as further options, and follow it.

    Equal work is submitted once: a run of the same pipeline, parameters and slot that goes on or succeeded is taken
    for this one; a failed one is not. Exit codes: 0 succeeded, 2 usage, 3 gate refused, 4 stale parent,
    5 integrity (as far as Kubeflow passes on what the step said), 124 not finished in time, 1 anything else.

    \b
    $ python -m pipelines submit --pipeline deletion-sweep --model-line digits --store-uri s3://salun/demo
    submitted  http://localhost:8888/#/runs/details/3c1f...
    claim-requests     running
    claim-requests     succeeded
    ...
    succeeded  salun-deletion-sweep digits 2026-11-24T02Z 8c1e55a0f3b2
    """  # noqa: D301
    _need_client()
    from pipelines import packages, parameters, registering, submitting

    package = packages.load_package(pipeline, image)
    form = parameters.read_parameters(package, context.args, os.environ)
    default = "hour" if "sweep" in package.name else ""
    work = submitting.Work(package, form, submitting.slot_of(slot if slot is not None else default))
    api = _connect(host, namespace, token_path, ui_host)
    version = registering.register(api, package)
    run = submitting.submit(api, work, version, experiment, service_account)
    _tell(f"{'submitted' if run.made else 'was there'}  {run.url}")
    if not wait:
        typer.echo(json.dumps(asdict(run)) if as_json else run.run_id)
        return
    with _left_going(run.url):
        result = submitting.follow(api, run.run_id, package.steps(), _tell, timeout=timeout, poll=poll)
    _print(result, as_json)


def status(
    run: Annotated[str | None, typer.Argument(help="Id of a run; else the newest runs are listed.")] = None,
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    experiment: Experiment = "salun",
    last: Annotated[int, typer.Option(min=1, max=200, help="How many runs to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Say where a run stands, step by step, or list the newest runs.

    The exit code of a run that failed is the one that `submit` gives.

    \b
    $ python -m pipelines status --last 2
    running    salun-deletion-sweep digits 2026-11-24T02Z 8c1e55a0f3b2  http://localhost:8888/#/runs/details/3c1f...
    succeeded  salun-deletion-sweep digits 2026-11-23T02Z 07f2a4c9be11  http://localhost:8888/#/runs/details/9b04...
    """  # noqa: D301
    _need_client()
    from pipelines import packages, submitting

    api = _connect(host, namespace, token_path, ui_host)
    if run:
        known = [step for name in packages.shipped() for step in packages.load_package(name).steps()]
        result = submitting.look(api, run, known)
        if not as_json:
            for step, state in result.steps.items():
                typer.echo(f"{step:<18} {state.lower()}")
        _print(result, as_json)
        return
    found = submitting.latest(api, experiment, last)
    if as_json:
        typer.echo(json.dumps([{"run_id": item.run_id, "name": item.name, "state": item.state} for item in found]))
        return
    for item in found:
        typer.echo(f"{item.state.lower():<9}  {item.name}  {item.url}")


def schedule(
    context: typer.Context,
    pipeline: Pipeline = "deletion-sweep",
    cron: Annotated[str, typer.Option(help="When: second minute hour day month weekday, in UTC.")] = "0 0 2 * * *",
    delete: Annotated[bool, typer.Option("--delete", help="Delete the recurring run.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recurring run.")] = False,
    cronjob: Annotated[
        bool, typer.Option("--print-cronjob-args", help="Print what a CronJob needs to do the same; ask nobody.")
    ] = False,
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    image: Image = None,
    experiment: Experiment = "salun",
    service_account: Account = None,
) -> None:
    """Create or update the recurring run of a model line's sweep, with the pipeline's parameters as further options.

    Use this or the CronJob of manifests/, not both.

    \b
    $ python -m pipelines schedule --cron '0 0 2 * * *' --model-line digits --store-uri s3://salun/demo
    created    salun-deletion-sweep digits  http://localhost:8888/#/recurringrun/details/51c2...
    """  # noqa: D301
    from pipelines import packages, parameters

    package = packages.load_package(pipeline, image)
    needed = ("model_line",) if delete or show else None
    form = parameters.read_parameters(package, context.args, os.environ, needed)
    if cronjob:
        from pipelines.scheduling import cronjob_entry

        typer.echo(yaml.safe_dump(cronjob_entry(cron, pipeline, context.args), sort_keys=False, width=120), nl=False)
        return
    _need_client()
    from pipelines import registering, scheduling

    wanted = scheduling.Schedule(package, form, scheduling.check_cron(cron), service_account)
    api = _connect(host, namespace, token_path, ui_host)
    if show:
        _show(api, scheduling.find_schedules(api, wanted.name, experiment))
    elif delete:
        count = scheduling.delete_schedule(api, wanted.name, experiment)
        typer.echo(f"{'deleted' if count else 'none':<9}  {wanted.name}")
    else:
        version = registering.register(api, package)
        identity, done = scheduling.put_schedule(api, wanted, version, experiment)
        typer.echo(f"{done:<9}  {wanted.name}  {api.link('recurringrun', identity)}")


def _connect(host: str, namespace: str | None, token_path: str | None, ui_host: str | None) -> Api:
    from pipelines.client import connect

    return connect(host, namespace, token_path, ui_host)


def _need_client() -> None:
    """Say which extra is missing where kfp's client is not installed."""
    from salun_core.errors import UsageError

    try:
        import pipelines.client  # noqa: F401
    except ModuleNotFoundError as error:
        remedy = "pip install 'salun[kfp]'"
        raise UsageError("kfp's client is not installed", f"there is no {error.name}", remedy) from error


def _show(api: Api, found: list[Any]) -> None:
    for item in found:
        cron = item.trigger.cron_schedule.cron if item.trigger and item.trigger.cron_schedule else "no cron"
        link = api.link("recurringrun", item.recurring_run_id)
        typer.echo(f"{str(item.status).lower():<9}  {item.display_name}  {cron}  {link}")
    if not found:
        typer.echo("none")


def _print(result: Result, as_json: bool) -> None:
    """Print a result, and end with its exit code."""
    typer.echo(json.dumps(asdict(result)) if as_json else f"{result.state.lower():<9}  {result.name}")
    if result.exit_code:
        typer.echo(f"Error: {result.error}", err=True)
        raise typer.Exit(result.exit_code)


@contextmanager
def _left_going(url: str) -> Iterator[None]:
    """Say, when this process is told to end, that the run is not."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _tell(f"The run goes on: {url}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(line: str) -> None:
    typer.echo(line, err=True)
