"""The first step of a deletion sweep as a component."""

from typing import NamedTuple

from kfp import dsl

from components._image import component


@component
def claim_requests(
    store_uri: str,
    model_line: str,
    run_id: str,
    summary: dsl.Output[dsl.Markdown],
    method: str = "default",
    density: float = 0.5,
    policy_uri: str = "auto",
    method_config: str = "{}",
    seed: int = 0,
    retrain_reference: bool = False,
    tune: bool = False,
    tune_budget: str = "20e",
    extra_metrics: str = "",
    evaluation_samples: str = "20000",
    min_requests: int = 16,
    max_requests: int = 64,
    max_wait_hours: float = 24.0,
    max_forget_fraction: float = 0.2,
    dry_run: bool = False,
) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs",
    [
        ("requests", int),
        ("forget_manifest_uri", str),
        ("method", str),
        ("density", float),
        ("method_config", str),
        ("reason", str),
        ("code", int),
    ],
):
    """Check the run form, claim the next batch of deletion requests of a model line, and freeze its forget set.

    A run that calls it again gets the same batch. If no batch is due, or another run works on the line, the batch is
    empty, which is not an error. Requests whose targets are not in the training data are completed here.

    Args:
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        summary: Why a batch is due, or why there is none.
        method: The unlearning method of the first recipe; after a refusal the cause decides which comes next.
        density: Share of the weights that the first recipe may change.
        policy_uri: The gate policy of the run: equal work that it refused is not tried again.
        method_config: Settings that replace the method's defaults, as JSON text.
        seed: Seed of the run.
        retrain_reference: Whether the evaluation also trains a model without the forget set.
        tune: Whether settings and density are searched for.
        tune_budget: Budget of the search.
        extra_metrics: Extra metrics of the evaluation.
        evaluation_samples: Most retained and most test images that the evaluation measures, or all.
        min_requests: A batch of this many requests is due at once.
        max_requests: Maximum number of requests in one run.
        max_wait_hours: A batch is due when its oldest request has waited for this many hours.
        max_forget_fraction: Maximum share of the training data that one run forgets.
        dry_run: Report what would be claimed, and write nothing.

    Returns:
        requests: How many requests were claimed; 0 when there is nothing to do.
        forget_manifest_uri: Address of the frozen forget set.
        method: The unlearning method of the recipe.
        density: Share of the weights that may change.
        method_config: Settings that replace the method's defaults, as JSON text.
        reason: Why the batch is due, or why no batch is due.
        code: 0, or the exit code of the run's outcome if it cannot start.
    """
    given = dict(locals())
    from dataclasses import astuple

    from salun_core.pods import steps
    from salun_core.pods.pod import Pod

    return astuple(steps.claim(Pod(store_uri, model_line, run_id), given, summary.path))
