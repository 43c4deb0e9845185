"""`salun run`: the whole pipeline in one process, without Kubeflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import DryRun, Settings, read_settings
from salun_core.cli.output import emit, emit_plan, print_metrics, say

if TYPE_CHECKING:
    from salun_core.steps.run import RunConfig, RunOutcome


def run(
    config: Annotated[Path | None, typer.Option("--config", help="run.yaml: the parameters of the run.")] = None,
    settings: Settings = [],  # noqa: B006 - typer reads it and hands over a new list
    work_dir: Annotated[
        Path | None, typer.Option("--work-dir", help="Folder for what the steps make; .salun/runs/<run> by default.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", envvar="SALUN_STORE_URI", help="The store, where the file names none.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Fetch, mask, unlearn, evaluate, and publish if the gate passes (exit code 3 when it refuses).

    With `tune: true` a search for which no setting stays within the policy is such a refusal.
    """
    from salun_core.cli.tuning import trial_line
    from salun_core.config import parse
    from salun_core.steps.run import RunConfig, new_run_id, run_all

    given = read_settings(settings, config)
    if store:
        given.setdefault("store_uri", store)
    parsed = parse(RunConfig, given, str(config or "run configuration"))
    if dry_run:
        _plan(parsed)
        return
    name = new_run_id()
    folder = work_dir or Path(".salun", "runs", name)
    outcome = run_all(parsed, folder, say, name, lambda record: say(trial_line(record)))
    emit(_facts(outcome, folder), lambda: _show(outcome, folder))


def _plan(config: RunConfig) -> None:
    from tempfile import TemporaryDirectory

    from salun_core.steps.fetch import fetch_model
    from salun_core.steps.opening import resolved_config

    config.check()
    with TemporaryDirectory(prefix="salun-run-") as folder:
        before = Path(folder, "before")
        found = fetch_model(config.store_uri, config.model_line, config.forget_manifest_uri, before)
        resolved_config(before, config.method, {**config.method_config, "seed": config.seed})
    counts = {"forget_samples": found.forget_count, "train_samples": found.train_count}
    emit_plan("run", {"would_publish": config.model_line, "parent": found.version, "method": config.method, **counts})


def _facts(outcome: RunOutcome, folder: Path) -> dict[str, object]:
    return {
        "run": outcome.run,
        "parent": outcome.parent,
        "version": outcome.published.version,
        "metrics": {name: item.model_dump(mode="json") for name, item in outcome.evidence.metrics.items()},
        "decision": outcome.published.decision.model_dump(mode="json"),
        "folder": str(folder),
        "report": str(outcome.report),
    }


def _show(outcome: RunOutcome, folder: Path) -> None:
    print_metrics(outcome.evidence)
    typer.echo(f"\nPASSED: {outcome.published.decision.summary}")
    typer.echo(f"published {outcome.published.version[:12]} in place of {outcome.parent[:12]}")
    typer.echo(f"report    {outcome.report}\nall else  {folder}")
