"""The scheduled pipeline: claim a batch of requests -> the unlearning pipeline -> settle, in any case."""

from typing import Any

from kfp import dsl

from components.claim_requests import claim_requests
from components.purge_store import purge_store
from components.settle_requests import settle_requests
from pipelines.form import PLACEMENT, pipeline
from pipelines.resources import configure, with_signing_key
from pipelines.unlearning import unlearning
from salun_core.steps.run_form import OLD_NAMES, DeletionSweepForm, RecipeForm
from salun_core.sweeps.policy import BatchLimits

NAME = "salun-deletion-sweep"
SETTLE_RETRIES = 8  # with their back-off over half an hour; the model line is blocked until it is settled


@pipeline(NAME, DeletionSweepForm)
def deletion_sweep(form: Any) -> None:  # noqa: ANN401 - kfp's channels have no types
    """Erase the due deletion requests of a model line, publish if the gate passes, and certify each request."""
    run = {"store_uri": form.store_uri, "model_line": form.model_line, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    recipe = {name: getattr(form, name) for name in ("method", "density", "method_config")}
    settled = settle_requests(**run)
    configure(with_signing_key(settled), form, hours=1, retries=SETTLE_RETRIES)
    with dsl.ExitHandler(settled):
        purged = purge_store(
            store_uri=form.store_uri, pipeline_root=form.pipeline_root, dry_run=form.dry_run, run_id=run["run_id"]
        )
        configure(with_signing_key(purged), form, hours=2)
        limits = {name: getattr(form, name) for name in BatchLimits.model_fields}
        claimed = claim_requests(
            **run, **recipe, **limits, seed=form.seed, policy_uri=form.policy_uri, dry_run=form.dry_run
        )
        configure(with_signing_key(claimed), form, hours=1)
        with dsl.If(claimed.outputs["requests"] > 0):
            # The placement is an argument too: the compiler declares no inputs for limits inside an exit handler.
            common = {name: getattr(form, name) for name in (*RecipeForm.model_fields, *OLD_NAMES, *PLACEMENT)}
            found = {name: claimed.outputs[name] for name in ("forget_manifest_uri", *recipe)}
            erased = unlearning(**common | found)
            erased.set_caching_options(enable_caching=False)
