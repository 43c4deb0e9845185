"""`python -m pipelines`: compile the pipelines, run one on this machine, or have Kubeflow run it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import yaml

from pipelines import packages
from pipelines.local import LocalRun, exit_on_signals, run_compiled
from pipelines.parameters import read_form, read_parameters
from salun_core.errors import SalunError, UsageError

if TYPE_CHECKING:
    from pipelines.client import Api
    from pipelines.runs import Result

CLAIM, SETTLE = "claim-requests", "settle-requests"
FORM = {"allow_extra_args": True, "ignore_unknown_options": True}

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Host = Annotated[
    str, typer.Option(envvar="KFP_ENDPOINT", help="Address of the API, such as http://ml-pipeline.kubeflow:8888.")
]
Ui = Annotated[
    str | None, typer.Option("--ui-host", envvar="KFP_UI_ENDPOINT", help="Address of the user interface, for links.")
]
Namespace = Annotated[
    str | None,
    typer.Option(
        envvar="KFP_NAMESPACE", help="Namespace of the runs on a multi-user Kubeflow. Default in a pod: its own."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token-path", envvar="KF_PIPELINES_SA_TOKEN_PATH", help="File of a ServiceAccount token; read at each call."
    ),
]
Pipeline = Annotated[
    str,
    typer.Option(help="unlearning, deletion-sweep or deletion-sweep-compact, or one of them with -cpu."),
]
Image = Annotated[
    str | None, typer.Option(envvar="SALUN_IMAGE", help="Image of every step. Default: the compiled one.")
]
Experiment = Annotated[str, typer.Option(envvar="KFP_EXPERIMENT", help="Experiment that lists the runs.")]
Account = Annotated[
    str | None,
    typer.Option("--service-account", envvar="KFP_SERVICE_ACCOUNT", help="ServiceAccount of the run's pods."),
]


class FormCommand(typer.core.TyperCommand):
    """A command that takes the parameters of the pipeline as further options, and lists them in its help."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - click's, which typer may carry itself
        """List the parameters of the default pipeline."""
        (default,) = (str(option.default) for option in self.params if option.name == "pipeline")
        fields = [
            (f"--{name.replace('_', '-')}", f"{item['description']} [{packages.default_text(item)}]")
            for name, item in packages.load_package(default).inputs.items()
        ]
        with formatter.section(f"Parameters of {default}"):
            formatter.write_dl(fields)


app = typer.Typer(
    name="python -m pipelines", help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


def main() -> None:
    """Run the command; an error ends in one line and its exit code."""
    try:
        app()
    except SalunError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command("compile")
def compile_command(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is out of date.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Only the pipelines for clusters without accelerators.")] = False,
    native: Annotated[
        Path | None,
        typer.Option("--kubernetes-native", metavar="DIR", help="Folder for Pipeline and PipelineVersion objects."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of these objects. Default: none.")] = None,
    s3_secrets: Annotated[
        str,
        typer.Option(
            envvar="SALUN_S3_SECRETS", metavar="STEP=SECRET,...", help="Secrets of single steps. Default: salun-s3."
        ),
    ] = "",
    fixed_uid: Annotated[
        bool,
        typer.Option(
            "--fixed-uid/--no-fixed-uid",
            envvar="SALUN_FIXED_UID",
            help="Set the image's uid in pods, or let OpenShift assign one.",
        ),
    ] = True,
    shared_memory: Annotated[
        str,
        typer.Option(envvar="SALUN_SHARED_MEMORY", metavar="SIZE", help="Limit of /dev/shm of the steps that compute."),
    ] = "",
    data_cache: Annotated[
        str,
        typer.Option(
            envvar="SALUN_DATA_CACHE_CLAIM",
            metavar="CLAIM",
            help="PersistentVolumeClaim in which the steps cache what they read of the data. Default: no cache.",
        ),
    ] = "",
) -> None:
    """Compile the pipelines and check the result.

    The files are in pipelines/compiled/. With --kubernetes-native only the objects in that folder are written or
    checked. SALUN_IMAGE names the image.

    \b
    $ python -m pipelines compile --check
    salun-unlearning.yaml is in step
    salun-unlearning-cpu.yaml is in step
    salun-deletion-sweep.yaml is in step
    salun-deletion-sweep-cpu.yaml is in step
    """  # noqa: D301
    from pipelines import compile as compiling

    stale = False
    for package in compiling.compile_all():
        if cpu and not package.name.endswith(compiling.CPU_SUFFIX):
            continue
        packages.fit_to_cluster(package, s3_secrets, shared_memory, data_cache, fixed_uid=fixed_uid)
        path = native / package.path.name if native else package.path
        text = packages.native_text(package, namespace) if native else package.text
        fault = packages.drift(path, text)
        stale |= fault is not None
        if fault and not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            fault = f"{path.name} was written"
        typer.echo(fault or f"{path.name} is in step")
    if check and stale:
        again = f" --kubernetes-native {native}" if native else ""
        typer.echo(f"To fix it: python -m pipelines compile{again}", err=True)
        raise typer.Exit(1)


@app.command(cls=FormCommand, context_settings=FORM)
def run(
    context: typer.Context,
    pipeline: Annotated[
        str, typer.Option(help="unlearning, deletion-sweep, or the file of a compiled pipeline.")
    ] = "unlearning",
    work_dir: Annotated[
        str | None,
        typer.Option("--work-dir", "--output-dir", help="Folder for all files of the run; by default a new one."),
    ] = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log of every step.")] = False,
) -> None:
    """Run a compiled pipeline on this machine.

    Each step runs in its own process. The pipeline's parameters are further options, and SALUN_STORE_URI replaces
    --store-uri. Progress goes to standard error, the outcome to standard output. Exit codes: 0 published, or nothing
    was due; 2 usage, 3 gate refused, 4 stale parent, 5 integrity, 1 anything else.

    \b
    $ python -m pipelines run --model-line digits --forget-manifest-uri forget.json --store-uri s3://salun/demo
    Executing task fetch-model (1 of 5)
      2.9 s
    ...
    published  digits@5f0c9b7a1d2e
    report     /tmp/salun-run-x1/report.html
    """  # noqa: D301
    package = packages.read_package(path) if (path := Path(pipeline)).is_file() else packages.load_package(pipeline)
    form = read_parameters(package, context.args, os.environ)
    source = path if path.is_file() else package.path
    folder = work_dir or tempfile.mkdtemp(prefix="salun-run-")
    outcome = run_compiled(source, form, folder, _progress, _progress if verbose else lambda line: None)
    typer.echo(json.dumps(_document(outcome)) if as_json else "\n".join(_lines(outcome, form.get("model_line", ""))))
    if outcome.exit_code:
        typer.echo(f"Error: {outcome.error}", err=True)
        raise typer.Exit(outcome.exit_code)


def _document(outcome: LocalRun) -> dict[str, object]:
    return {
        "exit_code": outcome.exit_code,
        "run": outcome.run,
        "error": outcome.error or None,
        "version": outcome.version,
        "parent": outcome.parent,
        "outcome": outcome.outcome.model_dump(mode="json") if outcome.outcome else None,
        "claimed": outcome.outputs.get(CLAIM),
        "settled": outcome.outputs.get(SETTLE),
        "seconds": {name: round(seconds, 3) for name, seconds in outcome.steps.items()},
        "files": {name: str(path) for name, path in outcome.files.items()},
    }


def _lines(outcome: LocalRun, line: str) -> Iterator[str]:
    """Yield the outcome for a reader: what a sweep claimed and settled, what was published, and the files."""
    claimed, settled = (outcome.outputs.get(step) for step in (CLAIM, SETTLE))
    if claimed:
        yield f"claimed    {claimed['requests']}: {claimed['reason']}"
    if settled and settled["status"]:
        counts = ", ".join(f"{settled[name]} {name}" for name in ("completed", "queued", "failed"))
        yield f"settled    {counts}"
    if outcome.version:
        yield f"published  {line}@{outcome.version[:12]}"
    elif outcome.exit_code == 0:
        yield "published  nothing"
    else:
        yield f"failed     at {outcome.failed}" if outcome.failed else "failed     before the first step"
    for name, path in sorted(outcome.files.items()):
        yield f"{name.split('.')[0]:<10} {path}"


@app.command()
def register(
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    pipeline: Annotated[list[str] | None, typer.Option(help="Only this pipeline; may be repeated.")] = None,
    image: Image = None,
) -> None:
    """Upload the pipelines to Kubeflow.

    Each becomes a version that is named by its digest, and appears in the user interface.

    \b
    $ python -m pipelines register --host http://localhost:8888 --ui-host http://localhost:8080
    uploaded   salun-deletion-sweep-5f0c9b7a1d2e  http://localhost:8080/#/pipelines/details/6f2d...
    was there  salun-unlearning-77d04c3b9a10      http://localhost:8080/#/pipelines/details/0a91...
    """  # noqa: D301
    _require_client()
    from pipelines import runs

    found = [packages.load_package(name, image) for name in pipeline or packages.shipped()]
    api = _connect(host, namespace, token_path, ui_host)
    for package, (version, made) in zip(found, runs.register_all(api, found), strict=True):
        state = "uploaded" if made else "was there"
        typer.echo(f"{state:<9}  {package.version}  {_place(api, 'pipelines', version.pipeline_id)}")


@app.command(cls=FormCommand, context_settings=FORM)
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
        typer.Option(help="Equal work in the same slot runs once: hour, day, or any word. Default for a sweep: hour."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run to its end.")] = True,
    timeout: Annotated[float, typer.Option(min=0, help="Maximum time to wait, in seconds.")] = 86400,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two queries of the state.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Submit a run and follow it.

    The pipeline's parameters are further options. Equal work is submitted once: if a run of the same pipeline,
    parameters and slot is active or succeeded, no new one starts. At the end it reads the run's outcome from the store,
    prints it, and exits with its code: 0 published or nothing to do, 2 wrong input, 3 gate refused, 4 stale parent or
    line held, 5 integrity, 124 not finished in time, 1 anything else. If this machine cannot read the store, the code
    depends on Kubeflow's state: 0 or 1.

    \b
    $ python -m pipelines submit --pipeline deletion-sweep --model-line digits --store-uri s3://salun/demo
    submitted  http://localhost:8080/#/runs/details/3c1f...
    claim-requests     running
    claim-requests     succeeded
    ...
    succeeded  salun-deletion-sweep digits 2026-11-24T02Z 8c1e55a0f3b2
    outcome    published: 3 requests were erased
    report     s3://salun/demo/runs/3c1f.../report.html
    """  # noqa: D301
    _require_client()
    from pipelines import runs

    package = packages.load_package(pipeline, image)
    given = read_parameters(package, context.args, os.environ)
    _check(package, given)
    job = runs.Job(package, given, experiment, service_account)
    default = "hour" if "sweep" in package.name else ""
    api = _connect(host, namespace, token_path, ui_host)
    run_id, made = runs.submit(api, job, runs.slot_of(slot if slot is not None else default))
    place = _place(api, "runs", run_id)
    _progress(f"{'submitted' if made else 'was there'}  {place}")
    if not wait:
        document = {"run_id": run_id, "url": api.link("runs", run_id) or None, "made": made}
        typer.echo(json.dumps(document) if as_json else run_id)
        return
    with _continuing(place):
        result = runs.follow(api, run_id, package.steps(), _progress, timeout=timeout, poll=poll)
    _print(result, as_json)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="Id of a run; without it the newest runs are listed.")] = None,
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    experiment: Experiment = "salun",
    last: Annotated[int, typer.Option(min=1, max=200, help="How many runs to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show the state of a run, step by step, or list the newest runs.

    For a run that ended it prints the outcome and ends with its exit code, as `submit` does.

    \b
    $ python -m pipelines status --last 2
    running    salun-deletion-sweep digits 2026-11-24T02Z 8c1e55a0f3b2  http://localhost:8080/#/runs/details/3c1f...
    succeeded  salun-deletion-sweep digits 2026-11-23T02Z 07f2a4c9be11  http://localhost:8080/#/runs/details/9b04...
    """  # noqa: D301
    _require_client()
    from pipelines import runs

    api = _connect(host, namespace, token_path, ui_host)
    if run:
        known = [step for name in packages.shipped() for step in packages.load_package(name).steps()]
        result = runs.look(api, run, known)
        if not as_json:
            for step, state in result.steps.items():
                typer.echo(f"{step:<18} {state.lower()}")
            for line in result.waiting().values():
                typer.echo(line)
        _print(result, as_json)
        return
    found = runs.latest(api, experiment, last)
    if as_json:
        typer.echo(json.dumps([{"run_id": item.run_id, "name": item.name, "state": item.state} for item in found]))
        return
    for item in found:
        typer.echo(f"{item.state.lower():<9}  {item.name}  {item.url or item.run_id}")


@app.command(cls=FormCommand, context_settings=FORM)
def schedule(
    context: typer.Context,
    pipeline: Pipeline = "deletion-sweep",
    cron: Annotated[str, typer.Option(help="Schedule: second minute hour day month weekday, in UTC.")] = "0 0 2 * * *",
    delete: Annotated[bool, typer.Option("--delete", help="Delete the recurring run.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recurring run.")] = False,
    cronjob: Annotated[
        bool,
        typer.Option(
            "--print-cronjob-args", help="Print the equivalent fields of a CronJob, without calling a server."
        ),
    ] = False,
    host: Host = "",
    namespace: Namespace = None,
    token_path: Token = None,
    ui_host: Ui = None,
    image: Image = None,
    experiment: Experiment = "salun",
    service_account: Account = None,
) -> None:
    """Create or update the nightly sweep of a model line.

    The pipeline's parameters are further options. Use either this or the CronJob of manifests/, not both. Neither an
    update nor --delete affects an active run (Kubeflow 2.16 or later).

    \b
    $ python -m pipelines schedule --cron '0 0 2 * * *' --model-line digits --store-uri s3://salun/demo
    created    salun-deletion-sweep digits  http://localhost:8080/#/recurringrun/details/51c2...
    """  # noqa: D301
    _require_client()
    from pipelines import schedules
    from pipelines.cron import parse_cron
    from pipelines.runs import Job

    package = packages.load_package(pipeline, image)
    form = read_parameters(package, context.args, os.environ, ("model_line",) if delete or show else None)
    if cronjob:
        read_form(package, form)
        entry = schedules.cronjob_entry(cron, pipeline, context.args)
        typer.echo(yaml.safe_dump(entry, sort_keys=False, width=120), nl=False)
        return
    job = Job(package, form, experiment, service_account)
    parse_cron(cron)
    if not (show or delete):
        _check(package, form)
    api = _connect(host, namespace, token_path, ui_host)
    if show:
        found = schedules.find_schedules(api, job)
        for item in found:
            at = item.trigger.cron_schedule.cron if item.trigger and item.trigger.cron_schedule else "no cron"
            link = _place(api, "recurringrun", item.recurring_run_id)
            typer.echo(f"{str(item.status).lower():<9}  {item.display_name}  {at}  {link}")
        if not found:
            typer.echo("none")
    elif delete:
        typer.echo(f"{'deleted' if schedules.delete_schedule(api, job) else 'none':<9}  {job.name}")
    else:
        identity, done = schedules.put_schedule(api, job, cron, _progress)
        typer.echo(f"{done:<9}  {job.name}  {_place(api, 'recurringrun', identity)}")


def _check(package: packages.Package, given: dict[str, Any]) -> None:
    """Check the parameters before the submission, as the first step does; what needs the store may be left to it."""
    from salun_core.steps.form_check import check_form

    check_form(read_form(package, given), in_pods=True, skipped=_progress)


def _connect(host: str, namespace: str | None, token_path: str | None, ui_host: str | None) -> Api:
    from pipelines.client import connect

    api = connect(host, namespace, token_path, ui_host)
    if not api.ui:
        _progress("Ids are printed in place of links: KFP_UI_ENDPOINT (--ui-host) names the user interface's address.")
    return api


def _place(api: Api, kind: str, identity: object) -> str:
    """Return the address of a page of the user interface, or the id if its address is not known."""
    return api.link(kind, str(identity)) or str(identity)


def _require_client() -> None:
    """Name the missing extra if kfp's client is not installed."""
    try:
        import pipelines.client  # noqa: F401
    except ModuleNotFoundError as error:
        remedy = "pip install 'salun[kfp]'"
        raise UsageError("kfp's client is not installed", f"there is no module {error.name}", remedy) from error


def _print(result: Result, as_json: bool) -> None:
    """Print a result with the outcome of a run that ended, and end with its exit code."""
    from pipelines.outcomes import Ending, read_ending
    from pipelines.runs import DONE

    ending = read_ending(result) if result.state in DONE else Ending(0)
    outcome = ending.outcome
    if as_json:
        facts = {name: value for name, value in asdict(result).items() if name not in ("namespace", "store_uri")}
        document = outcome.model_dump(mode="json") if outcome else None
        typer.echo(json.dumps({**facts, "exit_code": ending.code, "error": ending.error or None, "outcome": document}))
    else:
        typer.echo(f"{result.state.lower():<9}  {result.name}")
        if outcome:
            lines = {"outcome": f"{outcome.state}: {outcome.text}", "next": outcome.next, "report": outcome.report}
            for name, text in lines.items():
                if text:
                    typer.echo(f"{name:<9}  {text}")
    if ending.note:
        _progress(ending.note)
    if ending.code:
        typer.echo(f"Error: {ending.error}", err=True)
        raise typer.Exit(ending.code)


@contextmanager
def _continuing(place: str) -> Iterator[None]:
    """Report, when this process is interrupted, that the run continues."""
    with exit_on_signals(signal.SIGTERM):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            _progress(f"The run continues: {place}")
            raise


def _progress(line: str) -> None:
    typer.echo(line, err=True)
