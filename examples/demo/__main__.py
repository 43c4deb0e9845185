"""`python -m examples.demo`: forget real images end to end on this machine. `salun demo` runs it as well."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.failures import interruptible, reported
from salun_core.cli.options import DryRun
from salun_core.cli.output import (
    MODE,
    emit,
    emit_plan,
    epoch_progress,
    print_metrics,
    print_table,
    progress,
    silence_logs,
)

if TYPE_CHECKING:
    from examples.demo.stage import DemoOutcome, Filed

_MEANING = {
    "UA": "forgotten images that the model gets wrong",
    "UA_class": "only those of the forgotten class",
    "UA_samples": "only the single samples",
    "RA": "kept training images that it gets right",
    "TA": "unseen images that it gets right",
    "MIA": "forgotten images that an attack takes for unseen",
    "attack_auc": "how well an attack separates forgotten from unseen",
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
_GAUGES = ("salun_requests{", "salun_requests_overdue", "salun_oldest", "salun_unlearning_debt", "salun_runs_since")


class ModelKind(StrEnum):
    """The models that the diffusion demo can train."""

    STABLE_DIFFUSION = "stable-diffusion"
    DDPM = "ddpm"


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def demo(
    diffusion: Annotated[bool, typer.Option("--diffusion", help="Use a diffusion model, not a classifier.")] = False,
    kind: Annotated[ModelKind, typer.Option(help="With --diffusion: the model.")] = ModelKind.STABLE_DIFFUSION,
    data: Annotated[str | None, typer.Option(metavar="D", help="Your images: a folder, parquet, or a spec.")] = None,
    forget: Annotated[str, typer.Option(help="With --diffusion: the class to forget.")] = "sneaker",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the classifier's training.")] = None,
    port: Annotated[int | None, typer.Option(min=1024, max=65535, help="Port of the store. Default: any.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Folder of all files. Default: .salun/demo.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep earlier demos, and add a model line.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Only start the store of an earlier demo again.")] = False,
    dry_run: DryRun = False,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON document.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks and logs.")] = False,
) -> None:
    """Forget real images end to end: store, training, deletion requests, sweeps, certificates, report.

    The images are scikit-learn's digits; with --diffusion they are Fashion-MNIST, and the default folder is
    .salun/demo-diffusion. The exit code is 3 if the gate refuses.
    """
    MODE.json, MODE.debug = json, debug
    silence_logs()
    if diffusion or data in (None, "digits"):  # networks this small are too small for a second thread
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
    with reported():
        work = work_dir or Path(".salun", "demo-diffusion" if diffusion else "demo")
        if diffusion:
            _run_diffusion(work, kind, data, forget, port, keep=keep or serve, serve=serve, dry_run=dry_run)
        else:
            _run_classifier(work, data, epochs, port, keep=keep or serve, serve=serve, dry_run=dry_run)


def _run_classifier(
    work: Path, data: str | None, epochs: int | None, port: int | None, *, keep: bool, serve: bool, dry_run: bool
) -> None:
    from examples.demo.classifier import demo_spec, run_demo

    spec = demo_spec(data)
    if dry_run:
        emit_plan("demo", {"would_write": work, "data": spec.source, "train_limit": spec.train_limit})
        return
    with _store(work, port, keep, serve) as store_uri:
        outcome = run_demo(work, store_uri, spec, epochs, progress, epoch_progress)
    emit(_document(outcome), lambda: _show_classifier(outcome, work))
    outcome.decision.require()


def _run_diffusion(
    work: Path,
    kind: ModelKind,
    data: str | None,
    forget: str,
    port: int | None,
    *,
    keep: bool,
    serve: bool,
    dry_run: bool,
) -> None:
    from examples.demo.diffusion import DATA, diffusion_spec, run_diffusion_demo
    from salun_core.data import load_spec

    spec = diffusion_spec(kind.value, load_spec(data or DATA))
    if dry_run:
        facts = {"would_write": work, "kind": kind.value, "data": spec.source, "size": spec.size}
        emit_plan("demo-diffusion", facts)
        return
    with _store(work, port, keep, serve) as store_uri:
        outcome = run_diffusion_demo(work, store_uri, kind.value, spec, forget, progress, epoch_progress)
    emit(_document(outcome), lambda: _show_diffusion(outcome))
    outcome.decision.require()


@contextmanager
def _store(work: Path, port: int | None, keep: bool, serve: bool) -> Iterator[str]:
    """Run the demo's store for the duration of the block; with `serve` until Ctrl-C, without the block."""
    from examples.demo.stage import demo_store

    progress(f"starting the store in {work}")
    with demo_store(work, port, fresh=not keep, must_exist=serve) as store_uri:
        if serve:
            progress(f"{store_uri} is served until Ctrl-C. In another shell:\n  set -a; . {work}/s3.env; set +a")
            signal.pause()
            raise typer.Exit
        yield store_uri


def _document(outcome: DemoOutcome) -> dict[str, object]:
    return {
        "line": outcome.line,
        "parent": outcome.parent,
        "version": outcome.version,
        "passed": outcome.decision.passed,
        "summary": outcome.decision.summary,
        "metrics": {name: item.model_dump(mode="json") for name, item in outcome.evidence.metrics.items()},
        "seconds": {**outcome.seconds, **outcome.evidence.run.seconds},
        "requests": {
            name: {
                "names": item.target,
                "status": item.state.status.value,
                "outcome": item.state.last.outcome if item.state.last else None,
                "certificate": str(item.certificate) if item.certificate else None,
            }
            for name, item in outcome.requests.items()
        },
        "rollback": outcome.rollback,
        "files": {name: str(path) for name, path in outcome.files.items()},
    }


def _show_classifier(outcome: DemoOutcome, work: Path) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    evidence, seconds = outcome.evidence, outcome.evidence.run.seconds
    rows: list[tuple[object, ...]] = [
        (f"{name}  {_MEANING[name]}", *(percent(value) for value in (item.before, item.after, item.reference)))
        for name in _MEANING
        if (item := evidence.metrics.get(name)) is not None
    ]
    unlearning = seconds.get("mask", 0.0) + seconds.get("unlearn", 0.0)
    spent = (outcome.seconds["train"], unlearning, seconds.get("reference", 0.0))
    typer.echo()
    print_table(["", "before", "after", "retrained"], [*rows, ("seconds", *(f"{value:.1f}" for value in spent))])
    typer.echo()
    _show_decision(outcome)
    if outcome.rollback:
        typer.echo(f"\nA rollback was tried and refused:\n  {outcome.rollback}")
    typer.echo("\nThe exporter's page:")
    for text in outcome.files["metrics.txt"].read_text(encoding="utf-8").splitlines():
        if text.startswith(_GAUGES) and not text.endswith(" 0.0"):
            typer.echo(f"  {text}")
    _show_head(outcome)
    first = next((item.certificate for item in outcome.requests.values() if item.certificate), "CERTIFICATE")
    typer.echo(_NEXT.format(work=work, line=outcome.line, certificate=first, version=outcome.version[:12]))


def _show_diffusion(outcome: DemoOutcome) -> None:
    print_metrics(outcome.evidence)
    seconds = {**outcome.seconds, **outcome.evidence.run.seconds}
    typer.echo()
    print_table(["seconds", ""], [(name, f"{value:.1f}") for name, value in seconds.items()])
    typer.echo()
    _show_decision(outcome)
    _show_head(outcome)


def _show_decision(outcome: DemoOutcome) -> None:
    def ending(item: Filed) -> str:
        last = item.state.last
        return f"{item.state.status}: {last.outcome}" if last and last.outcome else f"{item.state.status}"

    typer.echo(f"{'PASSED' if outcome.decision.passed else 'REFUSED'}: {outcome.decision.summary}\n")
    rows = [
        (name, item.target, ending(item), "verified" if item.certificate else "-")
        for name, item in outcome.requests.items()
    ]
    print_table(["request", "target", "status", "certificate"], rows)


def _show_head(outcome: DemoOutcome) -> None:
    parent = f", made from {outcome.parent[:12]}" if outcome.version != outcome.parent else ", as before"
    typer.echo(f"\nmodel line {outcome.line}: HEAD is {outcome.version[:12]}{parent}")
    for name, path in outcome.files.items():
        typer.echo(f"  {name:<17} {path}")


def main() -> None:
    """Run the demo. SIGTERM ends it like Ctrl-C, so that its child processes end as well."""
    with interruptible():
        app(prog_name="python -m examples.demo")


if __name__ == "__main__":
    main()
