"""`salun run` and `salun sweep`: the pipeline in one process, without Kubeflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Also, DryRun, Settings, Store, Tune, TuneBudget, read_settings
from salun_core.cli.output import emit, emit_plan, print_metrics, say

if TYPE_CHECKING:
    from salun_core.steps.run import RunConfig, RunOutcome
    from salun_core.steps.sweep import SweepConfig, SweepOutcome
    from salun_core.sweeps.settle import Settled


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
    from salun_core.cli.unlearning import trial_line
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
    outcome = run_all(parsed, folder, say, name, lambda record: say(trial_line(record)))
    emit(_facts(outcome, folder), lambda: _show(outcome, folder))


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


Once = Annotated[bool, typer.Option("--once", help="Claim one batch, erase it, and settle it.")]
Settle = Annotated[
    str | None, typer.Option("--settle", metavar="RUN", help="Settle this run and free its model line; nothing else.")
]
Method = Annotated[str, typer.Option("--method", help="The first recipe's method; after refusals stronger ones.")]
Density = Annotated[float, typer.Option("--density", help="The first recipe's share of salient weights, in (0, 1].")]
MinRequests = Annotated[int, typer.Option("--min-requests", help="A batch of so many is due at once.")]
MaxRequests = Annotated[int, typer.Option("--max-requests", help="Requests of one run, at most.")]
MaxWait = Annotated[float, typer.Option("--max-wait-hours", help="A batch is due when its oldest waits longer.")]
MaxForget = Annotated[float, typer.Option("--max-forget-fraction", help="Share of the data that one run forgets.")]
Policy = Annotated[str, typer.Option("--policy", help="The gate policy: a name, a file or an s3:// address.")]
Reference = Annotated[
    bool, typer.Option("--retrain-reference", help="Also retrain without the forget set, and compare.")
]
WorkDir = Annotated[
    Path | None, typer.Option("--work-dir", help="Folder for what the steps make; .salun/runs/<run> by default.")
]


def sweep(
    line: Annotated[str, typer.Option("--line", help="The model line whose requests are swept.")],
    once: Once = False,
    settle: Settle = None,
    store: Store = None,
    method: Method = "salun",
    density: Density = 0.5,
    settings: Settings = [],  # noqa: B006 - typer reads it and hands over a new list
    seed: Annotated[int, typer.Option("--seed", help="Of the run.")] = 0,
    min_requests: MinRequests = 16,
    max_requests: MaxRequests = 64,
    max_wait_hours: MaxWait = 24.0,
    max_forget_fraction: MaxForget = 0.2,
    policy: Policy = "auto",
    retrain_reference: Reference = False,
    tune: Tune = False,
    tune_budget: TuneBudget = "20e",
    also: Also = "",
    work_dir: WorkDir = None,
    dry_run: DryRun = False,
) -> None:
    """Erase the deletion requests of a model line that are due, and certify each; 0 when nothing is due.

    The exit code is that of the error which ended the run: 3 when the gate refused, 4 when its parent was stale.
    `--set` overrides settings of the method, such as epochs=3. Certificates are signed with $SALUN_SIGNING_KEY.
    With --tune a search for which no setting stays within the policy is a refusal of the gate.
    """
    from salun_core.config import parse
    from salun_core.steps.sweep import SweepConfig

    _check(once, settle, store)
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


def _check(once: bool, settle: str | None, store: str | None) -> None:
    from salun_core.errors import UsageError

    if not store:
        raise UsageError("no store is named", "requests lie in a store", "give --store or set SALUN_STORE_URI")
    if once and settle:
        raise UsageError("--once and --settle exclude each other", "one sweeps, one settles", "give one of them")
    if not once and not settle:
        raise UsageError(
            "`salun sweep` does not stay and wait",
            "a schedule starts it: the pipeline salun-deletion-sweep in Kubeflow, or cron",
            "give --once, and call it from the schedule",
        )


def _sweep(config: SweepConfig, work_dir: Path | None) -> None:
    from salun_core.cli.unlearning import trial_line
    from salun_core.steps.sweep import sweep_once
    from salun_core.sweeps.runs import new_run_id

    run = new_run_id()
    folder = work_dir or Path(".salun", "runs", run)
    done = sweep_once(config, folder, say, run, lambda record: say(trial_line(record)))
    if config.dry_run:
        emit_plan("sweep", {"model_line": config.model_line, "would_claim": done.claimed.reason})
        return
    facts = _facts_sweep(done)
    emit(facts, lambda: _show_sweep(facts, config.model_line))
    if done.error:
        raise done.error


def _facts_sweep(done: SweepOutcome) -> dict[str, Any]:
    claimed, found = done.claimed, done.claimed.claim
    requests = _statuses(done.settled)
    if found:
        requests |= dict.fromkeys(found.nothing_to_erase, "completed") | dict.fromkeys(found.refused, "failed")
    return {
        "run": done.run,
        "claimed": claimed.requests,
        "reason": claimed.reason,
        "recipe": {"method": claimed.method, "density": claimed.density, "method_config": claimed.method_config},
        "verdict": _verdict(done),
        "requests": dict(sorted(requests.items())),
        "recovered": list(found.recovered) if found else [],
        "version": done.settled.version if done.settled else None,
        "report": str(done.outcome.report) if done.outcome else None,
        "error": str(done.error) if done.error else None,
    }


def _verdict(done: SweepOutcome) -> str | None:
    from salun_core.errors import GateRefusedError

    if done.outcome:
        return f"PASSED: {done.outcome.published.decision.summary}"
    return f"REFUSED: {done.error.why}" if isinstance(done.error, GateRefusedError) else None


def _statuses(settled: Settled | None) -> dict[str, str]:
    """Say where each request of a run stands now."""
    names = ("completed", "queued", "failed")
    return {request: name for name in names for request in getattr(settled, name, ())}


def _show_sweep(facts: dict[str, Any], line: str) -> None:
    typer.echo(f"run        {facts['run']}\nclaimed    {facts['claimed']}: {facts['reason']}")
    if facts["recovered"]:
        typer.echo(f"recovered  {', '.join(facts['recovered'])}: of a run that had died")
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
    facts = {"run": run, "status": settled.status, "requests": _statuses(settled), "version": settled.version}

    def show() -> None:
        typer.echo(f"run        {run}: {settled.status or 'it had claimed nothing'}")
        for request, status in _statuses(settled).items():
            typer.echo(f"settled    {request}: {status}")

    emit(facts, show)
