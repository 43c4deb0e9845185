"""`salun run` and `salun sweep`: the pipelines in one process, without Kubeflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import DryRun, OptionalStore, Settings, Store, WorkDir, read_settings
from salun_core.cli.output import emit, emit_plan, print_metrics, progress
from salun_core.errors import GateRefusedError, UsageError

if TYPE_CHECKING:
    from salun_core.steps.run import RunConfig
    from salun_core.steps.sweep import SweepConfig, SweepOutcome
    from salun_core.sweeps.settle import Settled
    from salun_core.tuning import TrialRecord

Tune = Annotated[bool, typer.Option("--tune", help="Search for the settings that you leave open, on validation data.")]
TuneBudget = Annotated[
    str, typer.Option("--tune-budget", metavar="B", help="Passes (200000), time (90s, 15m) or epochs (20e).")
]
Also = Annotated[
    str,
    typer.Option(
        "--also",
        metavar="NAMES",
        help="More measurements: lira[=MODELS], relearn[=STEPS], probe, decile, kl, tow, seeds[=RUNS].",
    ),
]


def trial_line(record: TrialRecord) -> str:
    """Return one trial of a search in one line."""
    settings = [
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in record.settings.items()
    ]
    settings += [f"density {record.density:g}"] if record.density is not None else []
    found = "no figures" if record.distance is None else f"distance {record.distance:.4f}"
    broken = f"; breaks {', '.join(record.refused)}" if record.refused else ""
    return f"trial {record.number}: {', '.join(settings)}, {record.epochs} epochs: {found}, {record.state}{broken}"


def run(
    config: Annotated[Path | None, typer.Option("--config", help="run.yaml: the parameters of the run.")] = None,
    settings: Settings = [],  # noqa: B006 - typer reads it and passes a new list
    work_dir: WorkDir = None,
    store: OptionalStore = None,
    dry_run: DryRun = False,
) -> None:
    """Fetch, mask, unlearn, evaluate, and publish if the gate passes. The exit code is 3 if the gate refuses.

    With `tune: true` the exit code is 3 as well if no setting satisfies the policy.
    """
    from salun_core.config import parse
    from salun_core.steps.run import RunConfig, run_all
    from salun_core.sweeps.runs import new_run_id

    given = read_settings(settings, config)
    if store:
        given.setdefault("store_uri", store)
    parsed = parse(RunConfig, given, str(config or "run configuration"))
    if dry_run:
        _plan(parsed)
        return
    name = new_run_id()
    folder = work_dir or Path(".salun", "runs", name)
    outcome = run_all(parsed, folder, progress, name, lambda record: progress(trial_line(record)))
    facts = {
        "run": outcome.run,
        "parent": outcome.parent,
        "version": outcome.published.version,
        "metrics": {name: item.model_dump(mode="json") for name, item in outcome.evidence.metrics.items()},
        "decision": outcome.published.decision.model_dump(mode="json"),
        "folder": str(folder),
        "report": str(outcome.report),
    }

    def show() -> None:
        print_metrics(outcome.evidence)
        typer.echo(f"\nPASSED: {outcome.published.decision.summary}")
        typer.echo(f"published {outcome.published.version[:12]} in place of {outcome.parent[:12]}")
        typer.echo(f"report    {outcome.report}\nall else  {folder}")

    emit(facts, show)


def _plan(config: RunConfig) -> None:
    from tempfile import TemporaryDirectory

    from salun_core.steps.fetch import fetch_model
    from salun_core.tasks import resolved_config

    config.check()
    with TemporaryDirectory(prefix="salun-run-") as folder:
        before = Path(folder, "before")
        found = fetch_model(config.store_uri, config.model_line, config.forget_manifest_uri, before)
        resolved_config(before, config.method, {**config.method_config, "seed": config.seed})
    counts = {"forget_samples": found.forget_count, "train_samples": found.train_count}
    emit_plan("run", {"would_publish": config.model_line, "parent": found.version, "method": config.method, **counts})


def sweep(
    line: Annotated[str, typer.Option("--line", help="The model line whose requests are swept.")],
    store: Store,
    once: Annotated[bool, typer.Option("--once", help="Claim one batch, erase it, and settle it.")] = False,
    settle: Annotated[
        str | None, typer.Option("--settle", metavar="RUN", help="Only settle this run and free its model line.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="The first recipe's method; after refusals stronger ones are tried.")
    ] = "salun",
    density: Annotated[
        float, typer.Option("--density", help="The first recipe's share of salient weights, in (0, 1].")
    ] = 0.5,
    settings: Settings = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="Seed of the run.")] = 0,
    min_requests: Annotated[int, typer.Option("--min-requests", help="A batch of this size is due at once.")] = 16,
    max_requests: Annotated[int, typer.Option("--max-requests", help="Largest number of requests in a run.")] = 64,
    max_wait_hours: Annotated[
        float, typer.Option("--max-wait-hours", help="A batch is due when its oldest request has waited longer.")
    ] = 24.0,
    max_forget_fraction: Annotated[
        float, typer.Option("--max-forget-fraction", help="Largest share of the data that a run forgets.")
    ] = 0.2,
    policy: Annotated[
        str, typer.Option("--policy", help="The gate policy: a name, a file or an s3:// address.")
    ] = "auto",
    retrain_reference: Annotated[
        bool, typer.Option("--retrain-reference", help="Also retrain without the forget set, and compare.")
    ] = False,
    tune: Tune = False,
    tune_budget: TuneBudget = "20e",
    also: Also = "",
    work_dir: WorkDir = None,
    dry_run: DryRun = False,
) -> None:
    """Erase the deletion requests of a model line that are due, and certify each. The exit code is 0 if none is due.

    Otherwise it is the code of the error that ended the run: 3 if the gate refused, 4 if the parent was stale.
    `--set` overrides settings of the method, such as epochs=3. $SALUN_SIGNING_KEY names the key for certificates.
    With --tune the gate counts as refusing if no setting satisfies the policy.
    """
    from salun_core.config import parse
    from salun_core.steps.sweep import SweepConfig

    if once and settle:
        raise UsageError("--once and --settle exclude each other", "one sweeps, one settles", "give one of them")
    if not once and not settle:
        raise UsageError(
            "`salun sweep` does not run as a service",
            "a schedule starts it: the pipeline salun-deletion-sweep in Kubeflow, or cron",
            "give --once, and call it from the schedule",
        )
    given = {
        "model_line": line,
        "store_uri": store,
        "method": method,
        "density": density,
        "method_config": read_settings(settings),
        "seed": seed,
        "min_requests": min_requests,
        "max_requests": max_requests,
        "max_wait_hours": max_wait_hours,
        "max_forget_fraction": max_forget_fraction,
        "policy_uri": policy,
        "retrain_reference": retrain_reference,
        "tune": tune,
        "tune_budget": tune_budget,
        "also": also,
        "dry_run": dry_run,
    }
    config = parse(SweepConfig, given, "the sweep")
    if settle:
        _settle(config, settle)
    else:
        _sweep(config, work_dir)


def _sweep(config: SweepConfig, work_dir: Path | None) -> None:
    from salun_core.steps.sweep import sweep_once
    from salun_core.sweeps.runs import new_run_id

    run = new_run_id()
    folder = work_dir or Path(".salun", "runs", run)
    done = sweep_once(config, folder, progress, run, lambda record: progress(trial_line(record)))
    if config.dry_run:
        emit_plan("sweep", {"model_line": config.model_line, "would_claim": done.claimed.reason})
        return
    facts = sweep_facts(done)
    emit(facts, lambda: _show_sweep(facts, config.model_line))
    if done.error:
        raise done.error


def sweep_facts(done: SweepOutcome) -> dict[str, Any]:
    """Return the outcome of a sweep as plain data."""
    claimed, found = done.claimed, done.claimed.claim
    requests = _statuses(done.settled)
    if found:
        requests |= dict.fromkeys(found.nothing_to_erase, "completed") | dict.fromkeys(found.refused, "failed")
    verdict = None
    if done.outcome:
        verdict = f"PASSED: {done.outcome.published.decision.summary}"
    elif isinstance(done.error, GateRefusedError):
        verdict = f"REFUSED: {done.error.why}"
    return {
        "run": done.run,
        "claimed": claimed.requests,
        "reason": claimed.reason,
        "recipe": {"method": claimed.method, "density": claimed.density, "method_config": claimed.method_config},
        "verdict": verdict,
        "requests": dict(sorted(requests.items())),
        "recovered": list(found.recovered) if found else [],
        "version": done.settled.version if done.settled else None,
        "report": str(done.outcome.report) if done.outcome else None,
        "error": str(done.error) if done.error else None,
    }


def _statuses(settled: Settled | None) -> dict[str, str]:
    """Return the status of each request of a run."""
    names = ("completed", "queued", "failed")
    return {request: name for name in names for request in getattr(settled, name, ())}


def _show_sweep(facts: dict[str, Any], line: str) -> None:
    typer.echo(f"run        {facts['run']}\nclaimed    {facts['claimed']}: {facts['reason']}")
    if facts["recovered"]:
        typer.echo(f"recovered  {', '.join(facts['recovered'])}: from a run that died")
    if facts["verdict"]:
        typer.echo(f"verdict    {facts['verdict']}")
    for request, status in facts["requests"].items():
        typer.echo(f"settled    {request}: {status}")
    if facts["version"]:
        typer.echo(f"published  {line}@{facts['version'][:12]}")
    if facts["report"]:
        typer.echo(f"report     {facts['report']}")


def _settle(config: SweepConfig, run: str) -> None:
    from salun_core.steps.settle import settle_requests

    settled = settle_requests(config.store_uri, config.model_line, run, config.sweep_policy())
    statuses = _statuses(settled)

    def show() -> None:
        typer.echo(f"run        {run}: {settled.status or 'it had claimed nothing'}")
        for request, status in statuses.items():
            typer.echo(f"settled    {request}: {status}")

    emit({"run": run, "status": settled.status, "requests": statuses, "version": settled.version}, show)
