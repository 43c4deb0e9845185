"""`salun run` and `salun sweep`: the pipelines in one process, without Kubeflow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.form import with_form
from salun_core.cli.options import DryRun, Settings, WorkDir, read_settings
from salun_core.cli.output import MODE, echo, emit, emit_plan, print_metrics, print_refusals, progress
from salun_core.errors import GateRefusedError, UsageError
from salun_core.steps.run_form import DeletionSweepForm, UnlearningForm

if TYPE_CHECKING:
    from salun_core.evaluation import Evidence
    from salun_core.gate import GateDecision
    from salun_core.steps.sweep import SweepOutcome
    from salun_core.sweeps.settle import Settled
    from salun_core.tuning import TrialRecord


def trial_line(record: TrialRecord) -> str:
    """Return one trial of a search in one line."""
    settings = [record.method]
    settings += [
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in record.settings.items()
    ]
    settings += [f"density {record.density:g}"] if record.density is not None else []
    found = "no figures" if record.distance is None else f"distance {record.distance:.4f}"
    broken = f"; breaks {', '.join(record.refused)}" if record.refused else ""
    return f"trial {record.number}: {', '.join(settings)}, {record.epochs} epochs: {found}, {record.state}{broken}"


@with_form(UnlearningForm, required=False)
def run(
    form: dict[str, Any],
    shared: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="run.yaml: the parameters of the run.")] = None,
    settings: Settings = [],
    work_dir: WorkDir = None,
    dry_run: DryRun = False,
) -> None:
    """Unlearn on a model line; publish if the gate passes.

    It runs all steps: fetch, mask, unlearn, evaluate, gate, publish. The exit code is 3 if the gate refuses. Options
    override the parameters in --config, and --set overrides both; but a store in that file has priority over --store.
    The settings file has the lowest priority; give it before the verb: salun --config FILE run. With `tune: true` the
    exit code is also 3 if no setting satisfies the policy.
    """
    from salun_core.config import parse
    from salun_core.gate import DECISION
    from salun_core.steps.run import run_all
    from salun_core.sweeps.runs import new_run_id

    store = {name: form.pop(name) for name in ("store_uri",) if name in form}
    given = shared | store | read_settings(settings, config, form)
    parsed = parse(UnlearningForm, given, str(config or "run configuration"))
    if dry_run:
        _plan(parsed)
        return
    name = new_run_id()
    folder = work_dir or Path(".salun", "runs", name)
    try:
        outcome = run_all(parsed, folder, progress, name, lambda record: progress(trial_line(record)))
    except GateRefusedError:
        if judged := _judged(folder):
            refused = {"run": name, "version": None, **_measured(*judged), **_places(folder)}
            emit(refused, lambda: _show_refused(folder))
            if not MODE.json:
                judged[1].require(str(folder / DECISION), told=True)
        raise
    facts = {
        "run": outcome.run,
        "parent": outcome.parent,
        "version": outcome.published.version,
        **_measured(outcome.evidence, outcome.published.decision),
        "folder": str(folder),
        "report": str(outcome.report),
    }

    def show() -> None:
        print_metrics(outcome.evidence)
        echo(f"\nPASSED: {outcome.published.decision.summary}")
        echo(f"published {outcome.published.version[:12]} in place of {outcome.parent[:12]}")
        echo(f"report    {outcome.report}\nall else  {folder}")

    emit(facts, show)


def _judged(folder: Path) -> tuple[Evidence, GateDecision] | None:
    """Return evidence and decision of a run that the gate refused; None if a search refused before it."""
    from salun_core.config import load
    from salun_core.evaluation import Evidence
    from salun_core.gate import DECISION, GateDecision
    from salun_core.steps.outcome import EVIDENCE

    if not (folder / DECISION).is_file():
        return None
    return load(Evidence, folder / EVIDENCE), load(GateDecision, folder / DECISION)


def _measured(evidence: Evidence, decision: GateDecision) -> dict[str, Any]:
    metrics = {name: item.model_dump(mode="json") for name, item in evidence.metrics.items()}
    return {"metrics": metrics, "decision": decision.model_dump(mode="json")}


def _places(folder: Path) -> dict[str, str]:
    from salun_core.steps.outcome import REPORT

    return {"folder": str(folder), "report": str(folder / REPORT)}


def _show_refused(folder: Path, told: str = "") -> None:
    """Print the metrics of a refused run, each rule that failed, and where its decision and its report are.

    `told` is what was printed before; a next step that is in it is not repeated.
    """
    from salun_core.gate import DECISION

    if judged := _judged(folder):
        evidence, decision = judged
        print_metrics(evidence)
        echo(f"\nREFUSED by policy {decision.policy}: {decision.counts}")
        print_refusals(decision, told)
        echo(f"decision  {folder / DECISION}\nreport    {_places(folder)['report']}")


def _plan(form: UnlearningForm) -> None:
    from tempfile import TemporaryDirectory

    from salun_core.steps.context import RunContext
    from salun_core.steps.fetch import fetch_model
    from salun_core.steps.form_check import check_form
    from salun_core.tasks.task import check_recipe

    check_form(form, in_pods=False)
    with TemporaryDirectory(prefix="salun-run-") as folder:
        context = RunContext(Path(folder, "before"), form.forget_manifest_uri, form.model_line, form.store_uri)
        found = fetch_model(context)
        recipe = check_recipe(context.task, form.recipe, tune=form.tune)
    counts = {"forget_samples": found.forget_count, "train_samples": found.train_count}
    emit_plan("run", {"would_publish": form.model_line, "parent": found.version, "method": recipe.method, **counts})


@with_form(DeletionSweepForm, required=True)
def sweep(
    form: dict[str, Any],
    shared: dict[str, Any],
    once: Annotated[bool, typer.Option("--once", help="Claim one batch, erase it, and settle it.")] = False,
    now: Annotated[
        bool, typer.Option("--now", help="As --once, without waiting for --min-requests or --max-wait-hours.")
    ] = False,
    settle: Annotated[str | None, typer.Option(metavar="RUN", help="Only settle this run and free its line.")] = None,
    settings: Settings = [],
    work_dir: WorkDir = None,
) -> None:
    """Process the due deletion requests of a model line.

    It erases their data and certifies each request. The exit code is 0 if the run succeeded or no batch is due, 3 if
    the gate refused, and 4 if the parent was stale. With --tune it is also 3 if no setting satisfies the policy.
    `--set` overrides settings of the method, such as epochs=3. $SALUN_SIGNING_KEY names the key for certificates.
    """
    from salun_core.config import parse
    from salun_core.gate import DECISION
    from salun_core.steps.sweep import sweep_once
    from salun_core.sweeps.runs import new_run_id

    if (once or now) and settle:
        given = "--once" if once else "--now"
        raise UsageError(f"{given} and --settle cannot be used together", "--settle runs no sweep", "give one of them")
    if not once and not now and not settle:
        raise UsageError(
            "`salun sweep` does not run as a service",
            "a schedule starts it: the pipeline salun-deletion-sweep in Kubeflow, or cron",
            "give --once, and call it from the schedule; --now sweeps at once",
        )
    form = (
        shared | form | ({"min_requests": 1} if now else {})
    )  # one request makes a batch; the limits of its size stay
    parsed = parse(DeletionSweepForm, {**form, "method_config": read_settings(settings)}, "the sweep")
    if settle:
        _settle(parsed, settle)
        return
    name = new_run_id()
    folder = work_dir or Path(".salun", "runs", name)
    done = sweep_once(parsed, folder, progress, name, lambda record: progress(trial_line(record)))
    if parsed.dry_run:
        plan = {"model_line": parsed.model_line, "would_claim": done.claimed.reason}
        emit_plan("sweep", {**plan, "due_at": done.claimed.due_at} if MODE.json else plan)
        return
    facts = sweep_facts(done)
    facts["outcomes"] = _outcomes(parsed.store_uri, facts["requests"])
    refused = isinstance(done.error, GateRefusedError)
    judged = _judged(folder) if refused else None
    facts |= {**_measured(*judged), **_places(folder)} if judged else {}

    def show() -> None:
        # The reasons of a refusal stand in one place: below with the metrics, or in the error if no model was measured.
        _show_sweep({**facts, "verdict": None} if refused else facts, parsed.model_line)
        if judged:
            echo()
            _show_refused(folder, facts["next"] or "")

    emit(facts, show)
    if judged and not MODE.json:
        judged[1].require(str(folder / DECISION), told=True)
    if done.error:
        raise done.error


def sweep_facts(done: SweepOutcome) -> dict[str, Any]:
    """Return the outcome of a sweep as plain data."""
    claimed, recipe = done.claimed, done.claimed.recipe
    requests = _statuses(done.settled)
    requests |= dict.fromkeys(claimed.nothing_to_erase, "completed") | dict.fromkeys(claimed.refused, "failed")
    requests |= dict.fromkeys(claimed.held, "on_hold")
    verdict = None
    if done.outcome:
        verdict = f"PASSED: {done.outcome.published.decision.summary}"
    elif isinstance(done.error, GateRefusedError):
        verdict = f"REFUSED: {done.error.why}"
    return {
        "run": done.run,
        "claimed": claimed.requests,
        "reason": claimed.reason,
        "skipped": claimed.skipped,
        "due_at": claimed.due_at,
        "recipe": {
            "method": recipe.method,
            "density": recipe.density,
            "method_config": json.dumps(recipe.method_config, sort_keys=True),
        },
        "verdict": verdict,
        "requests": dict(sorted(requests.items())),
        "next": (done.settled.next or None) if done.settled else None,
        "recovered": list(claimed.recovered),
        "version": done.settled.version if done.settled else None,
        "report": str(done.outcome.report) if done.outcome else None,
        "error": str(done.error) if done.error else None,
    }


def _outcomes(store_uri: str, requests: Iterable[str]) -> dict[str, str | None]:
    """Return how each request was met, or what a person must review."""
    from salun_core.requests.reading import read_last
    from salun_core.storage import open_store

    store = open_store(store_uri)
    last = {request: read_last(store, request) for request in requests}
    return {request: event.outcome.value if event and event.outcome else None for request, event in last.items()}


def _statuses(settled: Settled | None) -> dict[str, str]:
    """Return the status of each request of a run."""
    names = {"completed": "completed", "queued": "queued", "failed": "failed", "held": "on_hold"}
    return {request: status for name, status in names.items() for request in getattr(settled, name, ())}


_NEXT = {
    "failed": 'salun request retry {} --reason "..."',
    "on_hold": 'salun request release {} --reason "..."',
}


def _show_sweep(facts: dict[str, Any], line: str) -> None:
    echo(f"run        {facts['run']}\nclaimed    {facts['claimed']}: {facts['reason']}")
    if facts["due_at"]:
        echo(f"to erase them now: salun sweep --now --line {line}")
    if facts["recovered"]:
        echo(f"recovered  {', '.join(facts['recovered'])}: from a run that died")
    if facts["verdict"]:
        echo(f"verdict    {facts['verdict']}")
    for request, status in facts["requests"].items():
        outcome = facts["outcomes"][request]
        echo(f"settled    {request}: {status}{f': {outcome}' if outcome else ''}")
        if status in _NEXT:
            echo(f"           then: {_NEXT[status].format(request)}")
    if facts["next"]:
        echo(f"next       {facts['next']}")
    if facts["version"]:
        echo(f"published  {line}@{facts['version'][:12]}")
    if facts["report"]:
        echo(f"report     {facts['report']}")


def _settle(form: DeletionSweepForm, run: str) -> None:
    from salun_core.steps.settle import settle_requests

    settled = settle_requests(form.store_uri, form.model_line, run)
    statuses = _statuses(settled)

    def show() -> None:
        echo(f"run        {run}: {settled.status or 'it had claimed nothing'}")
        for request, status in statuses.items():
            echo(f"settled    {request}: {status}")
        if settled.next:
            echo(f"next       {settled.next}")

    facts = {"run": run, "status": settled.status, "requests": statuses, "version": settled.version}
    emit({**facts, "next": settled.next or None}, show)
