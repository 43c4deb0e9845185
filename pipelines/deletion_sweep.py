"""The scheduled pipelines: claim a batch of requests, unlearn it, settle; in a pod for each step, or in one."""

from typing import Any

from kfp import dsl

from components.claim_requests import claim_requests
from components.purge_store import purge_store
from components.sweep_compact import sweep_compact
from pipelines.form import pipeline
from pipelines.resources import Size, configure, with_signing_key
from pipelines.unlearning import after_fetch, end, fetch, net, recipe_of, run_address
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.sweeps.policy import BatchLimits

NAME, COMPACT = "salun-deletion-sweep", "salun-deletion-sweep-compact"


def _claim_form(form: Any) -> dict[str, Any]:  # noqa: ANN401
    limits = {name: getattr(form, name) for name in (*BatchLimits.model_fields, "dry_run")}
    return {**recipe_of(form), **limits}


def _purge(form: Any) -> None:  # noqa: ANN401
    purged = purge_store(store_uri=form.store_uri, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, dry_run=form.dry_run)
    configure(with_signing_key(purged), form, hours=2, size=Size.SMALL)


@pipeline(NAME, DeletionSweepForm)
def deletion_sweep(form: Any) -> None:  # noqa: ANN401 - kfp's channels have no types
    """Erase the due deletion requests of a model line, publish if the gate passes, and certify each request."""
    with dsl.ExitHandler(net(form), name="sweep"):
        _purge(form)
        claimed = claim_requests(**run_address(form), **_claim_form(form))
        configure(with_signing_key(claimed), form, hours=1, size=Size.SMALL)
        with dsl.If(claimed.outputs["requests"] > 0, name="something is due"):
            recipe = {name: claimed.outputs[name] for name in ("method", "density", "method_config")}
            forget = {"forget_manifest_uri": claimed.outputs["forget_manifest_uri"]}
            after_fetch(form, fetch(form, **forget, **recipe), **recipe)
        with dsl.If(claimed.outputs["code"] > 0, name="the sweep cannot start"):
            end(form)


@pipeline(COMPACT, DeletionSweepForm)
def deletion_sweep_compact(form: Any) -> None:  # noqa: ANN401
    """Erase the due deletion requests of a model line in one pod, for lines whose run takes minutes."""
    with dsl.ExitHandler(net(form), name="sweep"):
        _purge(form)
        swept = sweep_compact(**run_address(form), **_claim_form(form))
        configure(with_signing_key(swept), form, hours=24, size=Size.GPU)
        with dsl.If(swept.outputs["Output"] > 0, name="the outcome is bad"):
            end(form)
