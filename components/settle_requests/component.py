"""The last step of a deletion sweep as a component: it always runs."""

from typing import NamedTuple

from kfp import dsl

from components._image import component


@component
def settle_requests(
    store_uri: str,
    model_line: str,
    run_id: str,
    final_status: dsl.PipelineTaskFinalStatus,
    method: str = "salun",
    density: float = 0.5,
    method_config: str = "{}",
) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("status", str), ("completed", int), ("queued", int), ("failed", int)]
):
    """Complete and certify the requests of a published run, queue those of another again, and free the model line.

    What counts is what the store shows, not how the steps ended. Settling again is harmless.

    Args:
        store_uri: The object store that holds the model lines and the requests, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        final_status: How the steps before ended; Kubeflow fills it in.
        method: The unlearning method of the first recipe, as it was claimed with.
        density: Share of the weights that the first recipe may change.
        method_config: What differs from the method's default configuration, as JSON text.

    Returns:
        status: How the run ended: published, gate_refused, stale_parent or failed; empty where it claimed nothing.
        completed: Requests that were erased and certified.
        queued: Requests that try again.
        failed: Requests that a person must look at.

    Raises:
        UsageError: There is no signing key where a certificate is due.
    """
    from salun_core.steps.claim import is_generative_line, sweep_terms
    from salun_core.steps.settle import settle_requests as step
    from salun_core.steps.unlearning import parse_overrides

    generative = is_generative_line(store_uri, model_line)
    terms = sweep_terms(method, density, parse_overrides(method_config), generative=generative)
    settled = step(store_uri, model_line, run_id, terms)
    counts = len(settled.completed), len(settled.queued), len(settled.failed)
    print(f"the steps ended as {final_status.state}, run {run_id} as {settled.status or 'nothing claimed'}")
    return str(settled.status or ""), *counts
