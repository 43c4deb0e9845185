"""`salun demo-diffusion`: a diffusion model forgets, once, on this machine."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import DryRun
from salun_core.cli.output import emit, emit_plan, epoch_progress, print_metrics, print_table, progress

if TYPE_CHECKING:
    from salun_core.steps.demo_diffusion import DiffusionOutcome


class ModelKind(StrEnum):
    """Which model the demo trains."""

    STABLE_DIFFUSION = "stable-diffusion"
    DDPM = "ddpm"


def demo_diffusion(
    kind: Annotated[ModelKind, typer.Option("--kind", help="Which model.")] = ModelKind.STABLE_DIFFUSION,
    data: Annotated[
        str, typer.Option("--data", metavar="D", help="Labelled images: a name, a folder, parquet, or a spec.")
    ] = "fashion-mnist",
    forget: Annotated[str, typer.Option("--forget", help="The class that is to be forgotten.")] = "sneaker",
    port: Annotated[
        int | None, typer.Option("--port", min=1024, max=65535, help="Of the store; else a free one.")
    ] = None,
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Folder for all that the demo makes.")] = Path(
        ".salun", "demo-diffusion"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Keep what is there, and add model lines.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Forget one class of a small Stable Diffusion or DDPM end to end: training, request, sweep, grids, certificate."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nets this small: a second thread waits, and the first for it
    from salun_core.data import load_spec
    from salun_core.steps.demo_diffusion import diffusion_spec, run_diffusion_demo
    from salun_core.steps.demo_store import demo_store

    spec = diffusion_spec(kind.value, load_spec(data))
    if dry_run:
        emit_plan(
            "demo-diffusion", {"would_write": work_dir, "kind": kind.value, "data": spec.source, "size": spec.size}
        )
        return
    progress(f"starting the store in {work_dir}")
    with demo_store(work_dir, port, fresh=not keep, must_exist=False) as store_uri:
        outcome = run_diffusion_demo(work_dir, store_uri, kind.value, spec, forget, progress, epoch_progress)
    emit(_facts(outcome), lambda: _show(outcome))
    outcome.decision.require()


def _facts(outcome: DiffusionOutcome) -> dict[str, object]:
    state = outcome.request.state
    return {
        "line": outcome.line,
        "parent": outcome.parent,
        "version": outcome.version,
        "passed": outcome.decision.passed,
        "summary": outcome.decision.summary,
        "metrics": {name: item.model_dump(mode="json") for name, item in outcome.evidence.metrics.items()},
        "seconds": {**outcome.seconds, **outcome.evidence.run.seconds},
        "request": {
            "status": state.status.value,
            "outcome": state.last.outcome if state.last else None,
            "certificate": str(outcome.request.certificate) if outcome.request.certificate else None,
        },
        "files": {name: str(path) for name, path in outcome.files.items()},
    }


def _show(outcome: DiffusionOutcome) -> None:
    print_metrics(outcome.evidence)
    seconds = {**outcome.seconds, **outcome.evidence.run.seconds}
    print_table(["seconds", ""], [(name, f"{value:.1f}") for name, value in seconds.items()])
    typer.echo(f"\n{'PASSED' if outcome.decision.passed else 'REFUSED'}: {outcome.decision.summary}")
    state = outcome.request.state
    ending = f"{state.status}: {state.last.outcome}" if state.last and state.last.outcome else f"{state.status}"
    verified = ", its certificate verified" if outcome.request.certificate else ""
    typer.echo(f"request {state.request.id}: {ending}{verified}")
    typer.echo(f"model line {outcome.line}: HEAD is {outcome.version[:12]}")
    for name, path in outcome.files.items():
        typer.echo(f"  {name:<17} {path}")
