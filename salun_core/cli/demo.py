"""`salun demo`: everything once, on this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import DryRun
from salun_core.cli.output import METRICS, emit, emit_plan, epoch_progress, print_table, progress

if TYPE_CHECKING:
    from salun_core.steps.demo import DemoOutcome
    from salun_core.steps.demo_line import Filed


def demo(
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Own data: a folder of class folders, parquet, or a spec.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1024, max=65535, help="Of the store; else a free one.")
    ] = None,
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Folder for all that the demo makes.")] = Path(
        ".salun", "demo"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Keep what is there, and add a model line.")] = False,
    epochs_: Annotated[int | None, typer.Option("--epochs", min=1, help="Of the training.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Only start the store of an earlier demo again, until Ctrl-C.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Forget real images end to end: store, training, five deletion requests, two sweeps, certificates, report."""
    if data in (None, "digits"):  # images of 8 x 8 pixels: a second thread only waits for the first
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
    from salun_core.steps.demo import demo_spec, run_demo
    from salun_core.steps.demo_store import demo_store

    spec = demo_spec(data)
    if dry_run:
        emit_plan("demo", {"would_write": work_dir, "data": spec.source, "train_limit": spec.train_limit})
        return
    progress(f"starting the store in {work_dir}")
    with demo_store(work_dir, port, fresh=not (keep or serve), must_exist=serve) as store_uri:
        if serve:
            _serve(work_dir, store_uri)
            return
        outcome = run_demo(work_dir, store_uri, spec, epochs_, progress, epoch_progress)
    emit(_facts(outcome), lambda: _show(outcome, work_dir))
    outcome.decision.require()


def _serve(work_dir: Path, store_uri: str) -> None:
    progress(f"{store_uri} is served until Ctrl-C. In another shell:\n  set -a; . {work_dir}/s3.env; set +a")
    signal.pause()


def _facts(outcome: DemoOutcome) -> dict[str, object]:
    return {
        "line": outcome.line,
        "parent": outcome.parent,
        "version": outcome.version,
        "passed": outcome.decision.passed,
        "summary": outcome.decision.summary,
        "metrics": {name: item.model_dump(mode="json") for name, item in outcome.evidence.metrics.items()},
        "seconds": {"train": outcome.train_seconds, **outcome.evidence.run.seconds},
        "requests": {
            name: {
                "names": item.names,
                "status": item.state.status.value,
                "outcome": item.state.last.outcome if item.state.last else None,
                "certificate": str(item.certificate) if item.certificate else None,
            }
            for name, item in outcome.requests.items()
        },
        "rollback": outcome.rollback,
        "files": {name: str(path) for name, path in outcome.files.items()},
    }


def _show(outcome: DemoOutcome, work_dir: Path) -> None:
    _show_figures(outcome)
    typer.echo(f"\n{'PASSED' if outcome.decision.passed else 'REFUSED'}: {outcome.decision.summary}\n")
    rows = [(name, item.names, *_ending(item)) for name, item in outcome.requests.items()]
    print_table(["request", "names", "is", "certificate"], rows)
    if outcome.rollback:
        typer.echo(f"\nA rollback was tried and refused:\n  {outcome.rollback}")
    told = outcome.files["metrics.txt"].read_text(encoding="utf-8").splitlines()
    typer.echo("\nThe exporter says:")
    for text in told:
        if text.startswith(_TOLD) and not text.endswith(" 0.0"):
            typer.echo(f"  {text}")
    head, parent = outcome.version[:12], outcome.parent[:12]
    ancestry = f", made from {parent}" if outcome.version != outcome.parent else ", as before"
    typer.echo(f"\nmodel line {outcome.line}: HEAD is {head}{ancestry}")
    for name, path in outcome.files.items():
        typer.echo(f"  {name:<17} {path}")
    first = next((item.certificate for item in outcome.requests.values() if item.certificate), "CERTIFICATE")
    typer.echo(_NEXT.format(work=work_dir, line=outcome.line, certificate=first, version=head))


def _show_figures(outcome: DemoOutcome) -> None:
    evidence, seconds = outcome.evidence, outcome.evidence.run.seconds
    rows: list[tuple[object, ...]] = [
        (f"{name}  {_MEANING[name]}", *(_percent(value) for value in (item.before, item.after, item.reference)))
        for name in METRICS
        if (item := evidence.metrics.get(name)) is not None
    ]
    unlearning = seconds.get("mask", 0.0) + seconds.get("unlearn", 0.0)
    spent = (outcome.train_seconds, unlearning, seconds.get("reference", 0.0))
    typer.echo()
    print_table(["", "before", "after", "retrained"], [*rows, ("seconds", *(f"{value:.1f}" for value in spent))])


def _ending(item: Filed) -> tuple[str, str]:
    outcome = item.state.last.outcome if item.state.last else None
    status = f"{item.state.status}: {outcome}" if outcome else f"{item.state.status}"
    return status, "verified" if item.certificate else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


_MEANING = {
    "UA": "forgotten images that the model gets wrong",
    "UA_class": "of these: the forgotten class",
    "UA_samples": "of these: the single samples",
    "RA": "kept training images that it gets right",
    "TA": "unseen images that it gets right",
    "MIA": "forgotten images that an attack calls unseen",
    "attack_auc": "attack that tells forgotten from unseen (50 % is chance)",
    "gap": "mean distance to the retrained model",
}
_NEXT = """
Next, open the report, or look into the store. In one shell:
  salun demo --serve --work-dir {work}
and in another:
  set -a; . {work}/s3.env; set +a
  salun model history {line}
  salun request list
  salun verify {certificate} --model {work}/versions/{version}
  salun exporter"""
_TOLD = ("salun_requests{", "salun_requests_overdue", "salun_oldest", "salun_unlearning_debt", "salun_runs_since")
