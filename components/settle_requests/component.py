"""The exit handler of a run as a component: it always runs."""

from typing import NamedTuple

from kfp import dsl

from components._image import component


@component
def settle_requests(
    store_uri: str, model_line: str, run_id: str, final_status: dsl.PipelineTaskFinalStatus
) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("status", str), ("completed", int), ("queued", int), ("failed", int)]
):
    """Settle a run whose steps did not: certify, or queue its requests again, and release the model line.

    The state of the store decides, not how the steps ended. The step is idempotent, and needs nothing of the run form.

    Args:
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        final_status: Status of the previous steps; Kubeflow fills it in.

    Returns:
        status: How the run ended: published, gate_refused, stale_parent or failed; empty if it claimed nothing.
        completed: Requests that were erased and certified now.
        queued: Requests that are queued again now.
        failed: Requests that a person must look at.
    """
    from salun_core.pods import ends
    from salun_core.pods.pod import Pod

    pod = Pod(store_uri, model_line, run_id)
    settled = ends.settle(pod, final_status.state, final_status.error_message or "")
    counts = ends.counts_of(settled).values()
    print(f"the steps ended as {final_status.state}, run {run_id} as {settled.status or 'nothing claimed'}")
    return str(settled.status or ""), *counts
