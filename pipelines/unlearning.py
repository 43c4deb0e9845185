"""The unlearning pipeline: fetch -> mask -> unlearn -> evaluate -> gate & publish -> conclude."""

from typing import Any

from kfp import dsl

from components.compute_mask import compute_mask
from components.conclude import conclude
from components.evaluate import evaluate
from components.fetch_model import fetch_model
from components.gate_publish import gate_publish
from components.settle_requests import settle_requests
from components.unlearn import unlearn
from pipelines.form import pipeline
from pipelines.resources import Size, configure, with_signing_key
from salun_core.steps.run_form import RunForm, UnlearningForm

NAME = "salun-unlearning"
SETTLE_RETRIES = 8  # the net must hold: the requests wait until a run is settled


def run_address(form: Any) -> dict[str, Any]:  # noqa: ANN401 - kfp's channels have no types
    """Return the parameters by which each step finds its run."""
    return {"store_uri": form.store_uri, "model_line": form.model_line, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}


def recipe_of(form: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the parameters of the recipe, which the first step checks."""
    names = [name for name in RunForm.model_fields if name not in ("store_uri", "model_line")]
    return {name: getattr(form, name) for name in names}


def fetch(form: Any, **changes: Any) -> Any:  # noqa: ANN401
    """Add the first step; `changes` replace parameters of the form."""
    given = {"forget_manifest_uri": getattr(form, "forget_manifest_uri", ""), **recipe_of(form), **changes}
    return configure(fetch_model(**run_address(form), **given), form, hours=1, size=Size.SMALL)


def after_fetch(form: Any, fetched: Any, **recipe: Any) -> None:  # noqa: ANN401
    """Add the steps that follow the first one; each takes what the one before it made."""
    run = run_address(form)
    masked = compute_mask(
        inputs=fetched.outputs["inputs"], density=recipe.pop("density"), processes=form.gpu_count, **recipe, **run
    )
    unlearned = unlearn(
        mask=masked.outputs["mask"],
        seed=form.seed,
        tune=form.tune,
        tune_budget=form.tune_budget,
        policy_uri=form.policy_uri,
        processes=form.gpu_count,
        **recipe,
        **run,
    )
    measured = evaluate(
        unlearned=unlearned.outputs["unlearned"],
        retrain_reference=form.retrain_reference,
        extra_metrics=form.extra_metrics,
        evaluation_samples=form.evaluation_samples,
        processes=form.gpu_count,
        **run,
    )
    gated = gate_publish(evidence=measured.outputs["evidence"], policy_uri=form.policy_uri, **run)
    configure(masked, form, hours=2, size=Size.GPU)
    configure(unlearned, form, hours=24, size=Size.GPU)
    configure(measured, form, hours=24, size=Size.GPU)
    configure(with_signing_key(gated), form, hours=2)
    end(form, gated)


def end(form: Any, last: Any = None) -> None:  # noqa: ANN401
    """Add the step that fails the run if its outcome is bad. It is not repeated: a verdict stays."""
    concluded = conclude(**run_address(form)).set_display_name("conclude")
    if last is not None:
        concluded.after(last)
    configure(concluded, form, hours=1, size=Size.SMALL, retries=0)


def net(form: Any) -> Any:  # noqa: ANN401
    """Return the exit handler, which settles what the steps did not."""
    settled = settle_requests(**run_address(form))
    return configure(with_signing_key(settled), form, hours=1, size=Size.SMALL, retries=SETTLE_RETRIES)


@pipeline(NAME, UnlearningForm)
def unlearning(form: Any) -> None:  # noqa: ANN401 - kfp's channels have no types
    """Forget a part of the training data and publish the new model, if the gate passes it."""
    with dsl.ExitHandler(net(form), name="unlearning"):
        fetched = fetch(form)
        with dsl.If(fetched.outputs["code"] == 0, name="the line is free"):
            recipe = {name: getattr(form, name) for name in ("method", "density", "method_config")}
            after_fetch(form, fetched, **recipe)
        with dsl.If(fetched.outputs["code"] > 0, name="the run cannot start"):
            end(form)
