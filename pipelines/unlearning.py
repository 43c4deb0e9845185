"""The unlearning pipeline: fetch -> mask -> unlearn -> evaluate -> gate & publish."""

from typing import Any

from kfp import dsl

from components.compute_mask import compute_mask
from components.evaluate import evaluate
from components.fetch_model import fetch_model
from components.gate_publish import gate_publish
from components.unlearn import unlearn
from pipelines.form import pipeline
from pipelines.resources import configure
from salun_core.steps.run_form import UnlearningForm

NAME = "salun-unlearning"


@pipeline(NAME, UnlearningForm)
def unlearning(form: Any) -> None:  # noqa: ANN401 - kfp's channels have no types
    """Forget a part of the training data and publish the new model, if the gate passes it."""
    run = {
        "model_line": form.model_line,
        "store_uri": form.store_uri,
        "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        "forget_manifest_uri": form.forget_manifest_uri,
    }
    recipe = {"method": form.method, "method_config": form.method_config}
    fetched = fetch_model(**run)
    before = fetched.outputs["model"]
    masked = compute_mask(model=before, density=form.density, processes=form.gpu_count, **recipe, **run)
    mask = masked.outputs["mask"]
    unlearned = unlearn(
        model=before,
        mask=mask,
        seed=form.seed,
        tune=form.tune,
        tune_budget=form.tune_budget,
        policy_uri=form.policy_uri,
        processes=form.gpu_count,
        **recipe,
        **run,
    )
    after = unlearned.outputs["unlearned"]
    measured = evaluate(
        before=before,
        after=after,
        mask=mask,
        retrain_reference=form.retrain_reference,
        extra_metrics=form.extra_metrics,
        also=form.also,
        **run,
    )
    published = gate_publish(
        before=before,
        after=after,
        mask=mask,
        evidence=measured.outputs["evidence"],
        parent=fetched.outputs["Output"],
        policy_uri=form.policy_uri,
        **run,
    )
    configure(fetched, form, hours=1)
    configure(masked, form, hours=2, gpu=True)
    configure(unlearned, form, hours=24, gpu=True)
    configure(measured, form, hours=24, gpu=True)
    configure(published, form, hours=1)
