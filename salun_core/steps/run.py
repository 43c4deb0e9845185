"""The whole pipeline in one process: what `salun run` does, without Kubeflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.optional_metrics import parse_optional_metrics, require_reference
from salun_core.methods.method import resolve_config
from salun_core.registry.lookup import require_head
from salun_core.steps.claim import task_of_line
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.fetch import fetch_model
from salun_core.steps.mask import compute_mask
from salun_core.steps.publishing import EVIDENCE, REPORT, Published, gate_and_publish
from salun_core.steps.run_form import RecipeForm, UnlearningForm
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage import open_store
from salun_core.sweeps.heartbeat import line_held
from salun_core.sweeps.runs import new_run_id
from salun_core.tasks.resolve import check_policy
from salun_core.tasks.task import TuningOptions
from salun_core.tuning import parse_budget
from salun_core.tuning.search import OnTrial


def check_form(form: RecipeForm) -> None:
    """Refuse, before any work, parameters that would fail only after hours of it.

    Raises:
        UsageError: the policy cannot be read, or names a metric that is never measured; an extra metric is unknown or
            lacks the retrained model; or the model line and the method have nothing to search for.
    """
    check_policy(form.policy_uri)
    asked = parse_optional_metrics(form.extra_metrics)
    require_reference(asked, form.retrain_reference)
    if not (form.tune or asked):
        return
    task = task_of_line(open_store(form.store_uri), form.model_line)
    if asked and not task.optional_metrics:
        raise UsageError(
            f"{', '.join(asked)} cannot be measured on {form.model_line}",
            f"a {task.description} has no extra metrics",
            "leave extra_metrics out",
        )
    if form.tune:
        parse_budget(form.tune_budget, images=1)
        task.check_tuning(form.method, form.recipe.overrides)


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

    Args:
        form: the parameters.
        folder: working folder; each step writes to it.
        say: called with the name of each step before it starts.
        run: id of the run; a new one by default.
        on_trial: called after each trial of a search.

    Returns:
        What was made.

    Raises:
        UsageError: the form names something that does not exist.
        LineHeldError: another run works on the line.
        GateRefusedError: the gate refused, or the search found no setting that it would pass; nothing was published.
        SalunError: any step failed.
    """
    check_form(form)
    store, run = open_store(form.store_uri), run or new_run_id()
    require_head(store, form.model_line)  # no lease of a line that does not exist
    with line_held(store, form.model_line, run):
        return run_steps(form, folder, say, run, on_trial)


def run_steps(
    form: UnlearningForm, folder: Path, say: Callable[[str], None], run: str, on_trial: OnTrial | None = None
) -> RunOutcome:
    """Run the five steps for a run that holds the model line, in one process that loads models and data once.

    Arguments, result and errors are those of `run_all`.
    """
    recipe, after, mask, evidence = form.recipe, folder / "after", folder / "mask.safetensors", folder / EVIDENCE
    context = RunContext(folder / "before", form.forget_manifest_uri, form.model_line, form.store_uri, run)
    say("fetch_model")
    fetched = fetch_model(context)
    resolve_config(context.task.methods, recipe.method, recipe.overrides)
    say("compute_mask")
    compute_mask(context, recipe, mask)
    say("unlearn")
    tuning = TuningOptions(form.tune_budget, form.policy_uri, on_trial) if form.tune else None
    run_unlearning(context, recipe, mask, after, tuning=tuning)
    say("evaluate")
    measured = evaluate(
        context,
        after,
        evidence,
        folder / "evaluation.html",
        mask=mask,
        retrain_reference=form.retrain_reference,
        extra_metrics=form.extra_metrics,
    )
    say("gate_publish")
    published = gate_and_publish(
        context, after, evidence, folder / REPORT, parent=fetched.version, policy_uri=form.policy_uri, mask=mask
    )
    return RunOutcome(run, fetched.version, measured, published, folder / REPORT)
