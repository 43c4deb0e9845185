"""The whole pipeline in one process: what `salun run` does, without Kubeflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.optional_metrics import parse_optional_metrics, require_reference
from salun_core.methods.classification import METHODS
from salun_core.methods.method import get_method
from salun_core.steps.claim import is_generative_line
from salun_core.steps.evaluation import evaluate
from salun_core.steps.fetch import fetch_model
from salun_core.steps.mask import compute_mask
from salun_core.steps.observe import RunRef
from salun_core.steps.publishing import REPORT, Published, gate_and_publish
from salun_core.steps.run_form import RecipeForm, UnlearningForm
from salun_core.steps.unlearning import run_unlearning
from salun_core.sweeps.runs import new_run_id
from salun_core.tasks import resolved_config
from salun_core.tasks.classification.tuning import TuningOptions
from salun_core.tasks.resolve import check_policy
from salun_core.tuning import parse_budget
from salun_core.tuning.search import OnTrial
from salun_core.tuning.space import Space


def check_form(form: RecipeForm) -> None:
    """Refuse, before any work, parameters that would fail only after hours of it.

    Raises:
        UsageError: the policy cannot be read, or names a metric that is never measured; an extra metric is unknown or
            lacks the retrained model; or the model line and the method have nothing to search for.
    """
    check_policy(form.policy_uri)
    asked = parse_optional_metrics(form.extra_metrics)
    require_reference(asked, form.retrain_reference)
    if (form.tune or asked) and is_generative_line(form.store_uri, form.model_line):
        raise UsageError(
            f"{form.model_line} is a line of diffusion models",
            "`tune` and `extra_metrics` are for classifiers",
            "leave them out",
        )
    if form.tune:
        parse_budget(form.tune_budget, images=1)
        if not get_method(METHODS, form.method).fresh_start:  # such a method runs by its recipe
            Space.of(form.method, {**form.method_config, "seed": form.seed})


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
    """Run the five steps one after the other.

    Args:
        form: the parameters.
        folder: working folder; each step writes below it.
        say: called with the name of each step before it starts.
        run: id of the run; a fresh one by default.
        on_trial: called after each trial of a search.

    Returns:
        What was made.

    Raises:
        UsageError: the configuration asks for what there is not.
        GateRefusedError: the gate refused, or the search found no setting that it would pass; nothing was published.
        SalunError: any step failed.
    """
    check_form(form)
    run = run or new_run_id()
    ours = RunRef(form.store_uri, run)
    line, forget = form.model_line, form.forget_manifest_uri
    before, after, mask = folder / "before", folder / "after", folder / "mask.safetensors"
    say("fetch_model")
    method, overrides = form.method, form.method_config
    fetched = fetch_model(form.store_uri, line, forget, before, ours)
    resolved_config(before, method, {**overrides, "seed": form.seed})
    say("compute_mask")
    compute_mask(before, forget, form.density, mask, method=method, overrides=overrides, model_line=line, run=ours)
    say("unlearn")
    run_unlearning(
        before,
        mask,
        forget,
        after,
        method=method,
        overrides=overrides,
        seed=form.seed,
        model_line=line,
        run=ours,
        tune=TuningOptions(form.tune_budget, form.policy_uri, on_trial) if form.tune else None,
    )
    say("evaluate")
    evidence = evaluate(
        before,
        after,
        forget,
        folder / "evidence.json",
        folder / "evaluation.html",
        mask=mask,
        retrain_reference=form.retrain_reference,
        model_line=line,
        run=ours,
        extra_metrics=form.extra_metrics,
    )
    say("gate_publish")
    published = gate_and_publish(
        before,
        after,
        folder / "evidence.json",
        folder / REPORT,
        forget,
        store_uri=form.store_uri,
        model_line=line,
        parent=fetched.version,
        policy_uri=form.policy_uri,
        mask=mask,
        run=run,
    )
    return RunOutcome(run, fetched.version, evidence, published, folder / REPORT)
