"""The first step of a deletion sweep as a component."""

from typing import NamedTuple

from components._image import component


@component
def claim_requests(
    store_uri: str,
    model_line: str,
    run_id: str,
    method: str = "salun",
    density: float = 0.5,
    method_config: str = "{}",
    seed: int = 0,
    policy_uri: str = "auto",
    max_requests: int = 64,
    min_requests: int = 16,
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
    ],
):
    """Claim the next batch of deletion requests of a model line, and freeze its forget set.

    A run that calls it again gets the same batch. If no batch is due, or another run works on the line, the batch is
    empty, which is not an error. Requests whose targets are not in the training data are completed here.

    Args:
        store_uri: The object store that holds the model lines and the requests, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        method: The unlearning method of the first recipe; after refusals stronger ones and then retraining.
        density: Share of the weights that the first recipe may change.
        method_config: Settings that replace the method's defaults, as JSON text.
        seed: Seed of the run.
        policy_uri: The gate policy of the run: equal work that it refused is not tried again.
        max_requests: Maximum number of requests in one run.
        min_requests: A batch of this many requests is due at once.
        max_wait_hours: A batch is due when its oldest request has waited for so many hours.
        max_forget_fraction: Maximum share of the training data that one run forgets.
        dry_run: Report what would be claimed, and write nothing.

    Returns:
        requests: How many requests were claimed; 0 when there is nothing to do.
        forget_manifest_uri: Address of the frozen forget set.
        method: The unlearning method of the recipe.
        density: Share of the weights that may change.
        method_config: Settings that replace the method's defaults, as JSON text.
        reason: Why the batch is due, or why no batch is due.

    Raises:
        UsageError: A setting is out of range, the line does not exist, or a signing key is needed and missing.
        StoreError: The store's conditional writes are not safe.
        ConflictError: The run has ended already.
    """
    import json

    from salun_core.methods.recipe import parse_recipe
    from salun_core.steps.claim import claim_requests as step
    from salun_core.steps.claim import sweep_policy

    sizes = {"max_requests": max_requests, "min_requests": min_requests, "max_forget_fraction": max_forget_fraction}
    settings = {"policy_uri": policy_uri, "max_wait_hours": max_wait_hours, **sizes}
    policy = sweep_policy(store_uri, model_line, parse_recipe(method, density, method_config, seed), **settings)
    found = step(store_uri, model_line, run_id, policy, dry_run=dry_run)
    recipe, config = found.recipe, json.dumps(found.recipe.method_config, sort_keys=True)
    return found.requests, found.forget_uri, recipe.method, recipe.density, config, found.reason
