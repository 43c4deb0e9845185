"""`python -m pipelines`: compile the pipelines, run one on this machine, or have Kubeflow run it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import remote_cli
from pipelines.local import LocalRun, run_compiled
from salun_core.errors import SalunError

if TYPE_CHECKING:
    from pipelines.compile import Compiled

COMPILED = Path(__file__).resolve().parent / "compiled"
CLAIM, SETTLE = "claim-requests", "settle-requests"

Line = Annotated[str, typer.Option(help="Name of the model line.")]
Store = Annotated[str, typer.Option(envvar="SALUN_STORE_URI", help="The store: s3://bucket/prefix.")]
Forget = Annotated[
    str | None, typer.Option(help="What is to be forgotten: a file or an s3:// address; a sweep finds it itself.")
]
Method = Annotated[str, typer.Option(help="The unlearning method.")]
Density = Annotated[float, typer.Option(help="Share of the weights that may change.")]
Policy = Annotated[str, typer.Option(help="The gate policy: a name, a file or an s3:// address.")]
MethodConfig = Annotated[str, typer.Option(help="What differs from the method's defaults, as JSON.")]
Seed = Annotated[int, typer.Option(help="Seed of the run.")]
Reference = Annotated[
    bool, typer.Option("--retrain-reference", help="Also retrain without the forget set, and compare.")
]
Tune = Annotated[bool, typer.Option("--tune", help="Search for density and settings on validation data.")]
TuneBudget = Annotated[str, typer.Option(help="Of the search: passes (200000), time (90s, 15m) or epochs (20e).")]
Also = Annotated[str, typer.Option(help="More measurements, such as lira=16,relearn,probe,decile,seeds=3.")]
MinRequests = Annotated[int | None, typer.Option(help="Of a sweep: a batch of so many is due at once.")]
MaxRequests = Annotated[int | None, typer.Option(help="Of a sweep: requests of one run, at most.")]
MaxWaitHours = Annotated[float | None, typer.Option(help="Of a sweep: a batch is due when its oldest waits longer.")]
MaxForgetFraction = Annotated[float | None, typer.Option(help="Of a sweep: share of the data that a run forgets.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Of a sweep: say what would be claimed, write nothing.")]
Pipeline = Annotated[str, typer.Option(help="unlearning, deletion-sweep, or the file of a compiled pipeline.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the log of every step.")]
WorkDir = Annotated[
    str | None,
    typer.Option("--work-dir", "--output-dir", help="Folder for everything that the run writes; else a new one."),
]

app = typer.Typer(
    name="python -m pipelines", help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
remote_cli.add_to(app)


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
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a file is out of step.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Only those for clusters without accelerators.")] = False,
    native: Annotated[
        Path | None,
        typer.Option("--kubernetes-native", metavar="DIR", help="Write Pipeline and PipelineVersion objects there."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Of these objects; else they name none.")] = None,
    s3_secrets: Annotated[
        str,
        typer.Option(
            envvar="SALUN_S3_SECRETS", metavar="STEP=SECRET,...", help="Secrets of single steps; else salun-s3 for all."
        ),
    ] = "",
) -> None:
    """Compile the pipelines into pipelines/compiled/, and check what came out.

    With --kubernetes-native nothing but the objects in that folder is written or checked.

    \b
    $ python -m pipelines compile --check
    salun-unlearning.yaml is in step
    salun-unlearning-cpu.yaml is in step
    salun-deletion-sweep.yaml is in step
    salun-deletion-sweep-cpu.yaml is in step
    salun-sharded-mask.yaml is in step
    salun-sharded-mask-cpu.yaml is in step
    """  # noqa: D301
    from pipelines.compile import CPU_SUFFIX, compile_all, with_secrets
    from pipelines.step_secrets import read_secrets

    secrets = read_secrets(s3_secrets)
    chosen = [with_secrets(item, secrets) for item in compile_all() if not cpu or item.name.endswith(CPU_SUFFIX)]
    stale = [_compiled_to(item, native, namespace, check) for item in chosen]
    if check and any(stale):
        typer.echo(
            f"To fix it: python -m pipelines compile{f' --kubernetes-native {native}' if native else ''}", err=True
        )
        raise typer.Exit(1)


def _compiled_to(item: Compiled, native: Path | None, namespace: str | None, check: bool) -> bool:
    """Compare one pipeline with its file, write it unless this is a check, and return whether it was stale."""
    from pipelines.compile import drift
    from pipelines.native import native_drift, native_text

    path = native / item.path.name if native else item.path
    fault = native_drift(item, path, namespace) if native else drift(item)
    if fault and not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(native_text(item, namespace) if native else item.text, encoding="utf-8")
        fault = f"{path.name} was written"
    typer.echo(fault or f"{path.name} is in step")
    return fault is not None


@app.command()
def run(
    model_line: Line,
    store_uri: Store,
    forget_manifest_uri: Forget = None,
    method: Method = "salun",
    density: Density = 0.5,
    policy_uri: Policy = "auto",
    method_config: MethodConfig = "{}",
    seed: Seed = 0,
    retrain_reference: Reference = False,
    tune: Tune = False,
    tune_budget: TuneBudget = "20e",
    also: Also = "",
    min_requests: MinRequests = None,
    max_requests: MaxRequests = None,
    max_wait_hours: MaxWaitHours = None,
    max_forget_fraction: MaxForgetFraction = None,
    dry_run: DryRun = False,
    work_dir: WorkDir = None,
    pipeline: Pipeline = "unlearning",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run the compiled pipeline on this machine, each step in a process of its own.

    Progress goes to standard error, the outcome to standard output. Exit codes: 0 published, or nothing was due;
    2 usage, 3 gate refused, 4 stale parent, 5 integrity, 1 anything else.

    \b
    $ python -m pipelines run --model-line digits --forget-manifest-uri forget.json --store-uri s3://salun/demo
    Executing task fetch-model (1 of 5)
      2.9 s
    ...
    published  digits@5f0c9b7a1d2e
    report     /tmp/salun-run-x1/report.html
    """  # noqa: D301
    arguments = {
        "model_line": model_line,
        "forget_manifest_uri": forget_manifest_uri,
        "store_uri": store_uri,
        "method": method,
        "density": density,
        "policy_uri": policy_uri,
        "method_config": method_config,
        "seed": seed,
        "retrain_reference": retrain_reference,
        "tune": tune,
        "tune_budget": tune_budget,
        "also": also,
        "min_requests": min_requests,
        "max_requests": max_requests,
        "max_wait_hours": max_wait_hours,
        "max_forget_fraction": max_forget_fraction,
        "dry_run": dry_run or None,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    folder = work_dir or tempfile.mkdtemp(prefix="salun-run-")
    outcome = run_compiled(_compiled(pipeline), given, folder, _tell, _tell if verbose else lambda line: None)
    typer.echo(json.dumps(_plain(outcome)) if as_json else "\n".join(_lines(outcome, model_line)))
    if outcome.exit_code:
        typer.echo(f"Error: {outcome.error}", err=True)
        raise typer.Exit(outcome.exit_code)


def _compiled(name: str) -> Path:
    """Return the file of a pipeline that ships by its short name, or the file that is named."""
    shipped = COMPILED / f"salun-{name}.yaml"
    return shipped if shipped.is_file() else Path(name)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _plain(outcome: LocalRun) -> dict[str, object]:
    return {
        "exit_code": outcome.exit_code,
        "run": outcome.run,
        "error": outcome.error or None,
        "version": outcome.version,
        "parent": outcome.parent,
        "claimed": outcome.outputs.get(CLAIM),
        "settled": outcome.outputs.get(SETTLE),
        "seconds": {name: round(seconds, 3) for name, seconds in outcome.steps.items()},
        "files": {name: str(path) for name, path in outcome.files.items()},
    }


def _lines(outcome: LocalRun, line: str) -> list[str]:
    files = (f"{name.split('.')[0]:<10} {path}" for name, path in sorted(outcome.files.items()))
    return [*_swept(outcome), _head(outcome, line), *files]


def _head(outcome: LocalRun, line: str) -> str:
    if outcome.version:
        return f"published  {line}@{outcome.version[:12]}"
    if outcome.exit_code == 0:
        return "published  nothing"
    return f"failed     at {outcome.failed}" if outcome.failed else "failed     before the first step"


def _swept(outcome: LocalRun) -> Iterator[str]:
    """Say what a sweep claimed, and what became of it."""
    claimed, settled = (outcome.outputs.get(step) for step in (CLAIM, SETTLE))
    if claimed:
        yield f"claimed    {claimed['requests']}: {claimed['reason']}"
    if settled and settled["status"]:
        counts = ", ".join(f"{settled[name]} {name}" for name in ("completed", "queued", "failed"))
        yield f"settled    {counts}"
