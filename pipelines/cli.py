"""`python -m pipelines`: compile the pipelines, and run a compiled one on this machine."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from pipelines.local import LocalRun, run_compiled
from salun_core.errors import SalunError

COMPILED = Path(__file__).resolve().parent / "compiled"
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
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a file is out of step.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Only the pipeline for clusters without accelerators.")] = False,
) -> None:
    """Compile the pipelines into pipelines/compiled/, and check what came out.

    \b
    $ python -m pipelines compile --check
    salun-unlearning.yaml is in step
    salun-unlearning-cpu.yaml is in step
    """  # noqa: D301
    from pipelines.compile import CPU_NAME, compile_all, drift

    stale = False
    for item in compile_all():
        if cpu and item.name != CPU_NAME:
            continue
        fault = drift(item)
        stale = stale or fault is not None
        if fault and not check:
            item.path.parent.mkdir(exist_ok=True)
            item.path.write_text(item.text, encoding="utf-8")
            fault = f"{item.path.name} was written"
        typer.echo(fault or f"{item.path.name} is in step")
    if check and stale:
        typer.echo("To fix it: python -m pipelines compile", err=True)
        raise typer.Exit(1)


@app.command()
def run(
    model_line: Annotated[str, typer.Option(help="Name of the model line.")],
    forget_manifest_uri: Annotated[str, typer.Option(help="What is to be forgotten: a file or an s3:// address.")],
    store_uri: Annotated[str, typer.Option(envvar="SALUN_STORE_URI", help="The store: s3://bucket/prefix.")],
    method: Annotated[str, typer.Option(help="The unlearning method.")] = "salun",
    density: Annotated[float, typer.Option(help="Share of the weights that may change.")] = 0.5,
    policy_uri: Annotated[
        str, typer.Option(help="The gate policy: a name, a file or an s3:// address.")
    ] = "classifier",
    method_config: Annotated[str, typer.Option(help="What differs from the method's defaults, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    retrain_reference: Annotated[
        bool, typer.Option("--retrain-reference", help="Also retrain without the forget set, and compare.")
    ] = False,
    work_dir: Annotated[
        str | None,
        typer.Option(
            "--work-dir",
            "--output-dir",
            help="Folder of this machine for everything that the run writes; else a new one.",
        ),
    ] = None,
    pipeline: Annotated[Path, typer.Option(help="The compiled pipeline.")] = COMPILED / "salun-unlearning.yaml",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log of every step.")] = False,
) -> None:
    """Run the compiled pipeline on this machine, each step in a process of its own.

    Progress goes to standard error, the outcome to standard output. Exit codes: 0 published, 2 usage,
    3 gate refused, 4 stale parent, 5 integrity, 1 anything else.

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
    }
    folder = work_dir or tempfile.mkdtemp(prefix="salun-run-")
    outcome = run_compiled(pipeline, arguments, folder, _tell, _tell if verbose else lambda line: None)
    typer.echo(json.dumps(_plain(outcome)) if as_json else "\n".join(_lines(outcome, model_line)))
    if outcome.exit_code:
        typer.echo(f"Error: {outcome.error}", err=True)
        raise typer.Exit(outcome.exit_code)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _plain(outcome: LocalRun) -> dict[str, object]:
    return {
        "exit_code": outcome.exit_code,
        "error": outcome.error or None,
        "version": outcome.version,
        "parent": outcome.parent,
        "seconds": {name: round(seconds, 3) for name, seconds in outcome.steps.items()},
        "files": {name: str(path) for name, path in outcome.files.items()},
    }


def _lines(outcome: LocalRun, line: str) -> list[str]:
    ended = f"failed     at {list(outcome.steps)[-1]}" if outcome.steps else "failed     before the first step"
    head = f"published  {line}@{outcome.version[:12]}" if outcome.version else ended
    return [head, *(f"{name.split('.')[0]:<10} {path}" for name, path in sorted(outcome.files.items()))]
