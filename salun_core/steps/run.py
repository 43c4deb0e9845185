"""The whole pipeline in one process: what `salun run` does, without Kubeflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salun_core.data import LoadedData
from salun_core.evaluation import Evidence
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.fetch import fetch_model
from salun_core.steps.form_check import check_form
from salun_core.steps.mask import compute_mask
from salun_core.steps.outcome import EVIDENCE, REPORT
from salun_core.steps.publishing import Published, gate_and_publish
from salun_core.steps.run_form import UnlearningForm
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage import open_store
from salun_core.sweeps.heartbeat import line_held
from salun_core.sweeps.runs import new_run_id
from salun_core.tasks.task import TuningOptions, check_recipe
from salun_core.tuning.search import OnTrial


@dataclass(frozen=True)
class RunOutcome:
    """What a run made: its id, the parent it started from, evidence, and what was published."""

    run: str
    parent: str
    evidence: Evidence
    published: Published
    report: Path


def run_all(
    form: UnlearningForm,
    folder: Path,
    say: Callable[[str], None] = lambda step: None,
    run: str | None = None,
    on_trial: OnTrial | None = None,
) -> RunOutcome:
    """Hold the model line and run the five steps one after the other; no sweep works on the line meanwhile.

    Each step writes to `folder`. `say` is called with the name of each step before it starts, and with the reason of
    the end of measured rounds; `on_trial` after each trial of a search. LineHeldError: another run works on the line.
    GateRefusedError: the gate refused, or the search found no setting that it would pass; nothing was published.
    """
    check_form(form, in_pods=False)  # also that the line exists: there is no lease of one that does not
    store, run = open_store(form.store_uri), run or new_run_id()
    with line_held(store, form.model_line, run):
        return run_steps(form, folder, say, run, on_trial)


def run_steps(
    form: UnlearningForm,
    folder: Path,
    say: Callable[[str], None],
    run: str,
    on_trial: OnTrial | None = None,
    loaded: LoadedData | None = None,
) -> RunOutcome:
    """Run the five steps for a run that holds the model line, in one process that loads models and data once.

    Arguments, result and errors are those of `run_all`. `loaded` is what this process has read of the data already; it
    is used if it is what the model was trained on.
    """
    recipe, after, mask, evidence = form.recipe, folder / "after", folder / "mask.safetensors", folder / EVIDENCE
    context = RunContext(
        folder / "before", form.forget_manifest_uri, form.model_line, form.store_uri, run, loaded=loaded
    )
    say("fetch_model")
    fetched = fetch_model(context)
    recipe = check_recipe(context.task, recipe, tune=form.tune)
    say("compute_mask")
    compute_mask(context, recipe, mask)
    say("unlearn")
    tuning = TuningOptions(form.tune_budget, form.policy_uri, on_trial) if form.tune else None
    result = run_unlearning(context, recipe, mask, after, tuning=tuning)
    if result.ended:
        say(f"unlearn ended: {result.ended}")
    say("evaluate")
    measured = evaluate(
        context,
        after,
        evidence,
        folder / "evaluation.html",
        mask=mask,
        retrain_reference=form.retrain_reference,
        extra_metrics=form.extra_metrics,
        evaluation_samples=form.evaluation_samples,
    )
    say("gate_publish")
    published = gate_and_publish(
        context, after, evidence, folder / REPORT, parent=fetched.version, policy_uri=form.policy_uri, mask=mask
    )
    return RunOutcome(run, fetched.version, measured, published, folder / REPORT)
