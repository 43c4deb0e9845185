"""The scheduled pipeline: claim a batch of requests -> the unlearning pipeline -> settle, in any case."""

from kfp import dsl

from components.claim_requests import claim_requests
from components.purge_store import purge_store
from components.settle_requests import settle_requests
from pipelines.resources import Placement, configure, pipeline, with_signing_key
from pipelines.unlearning import unlearning

NAME = "salun-deletion-sweep"
SETTLE_RETRIES = 8  # with their back-off over half an hour; the model line is blocked until it is settled


@pipeline(NAME)
def deletion_sweep(
    model_line: str,
    store_uri: str,
    method: str = "salun",
    density: float = 0.5,
    policy_uri: str = "auto",
    method_config: str = "{}",
    seed: int = 0,
    retrain_reference: bool = False,
    tune: bool = False,
    tune_budget: str = "20e",
    also: str = "",
    min_requests: int = 16,
    max_requests: int = 64,
    max_wait_hours: float = 24.0,
    max_forget_fraction: float = 0.2,
    dry_run: bool = False,
    pipeline_root: str = "",
    gpu_count: int = 1,
    cpu: str = "4",
    memory: str = "16Gi",
    node_selector: dict[str, str] = {},  # noqa: B006 - kfp reads the default and never calls with it
    tolerations: list[dict[str, str]] = [],  # noqa: B006
) -> None:
    """Erase the due deletion requests of a model line, publish if the gate passes, and certify each request.

    Args:
        model_line: Name of the model line whose requests are swept.
        store_uri: The object store that holds the model lines and the requests, as s3://bucket/prefix.
        method: The unlearning method of the first recipe; after refusals stronger ones and then retraining.
        density: Share of the weights that the first recipe may change, above 0 and at most 1.
        policy_uri: The gate policy: auto (by the kind of model), a shipped policy's name, or an s3:// address.
        method_config: Settings that replace the method's defaults, as JSON text such as {"epochs": 5}.
        seed: Seed of the random labels, the order of the data and the augmentation.
        retrain_reference: Also train a model from scratch without the forget set, and compare with it. Slow.
        tune: Search for density and settings on validation data, within the policy's margins; classifiers only.
        tune_budget: Budget of the search: passes (200000), time (90s, 15m, 2h) or epochs (20e).
        also: Extra metrics, such as lira=16,relearn,probe,decile,seeds=3; with a reference also kl,tow.
        min_requests: A batch of this many requests is due at once.
        max_requests: Maximum number of requests in one run.
        max_wait_hours: A batch is due when its oldest request has waited for so many hours.
        max_forget_fraction: Maximum share of the training data that one run forgets.
        dry_run: Report what would be claimed and how much would be purged, and write nothing.
        pipeline_root: Where Kubeflow stores artifacts, such as s3://mlpipeline/v2/artifacts, to purge them too.
        gpu_count: Accelerators for each of the steps that compute; mask and unlearning run one process on each.
        cpu: Processor cores for each step, such as 4 or 500m.
        memory: Memory for each step, such as 16Gi.
        node_selector: Labels that the nodes must have, as a JSON object.
        tolerations: Taints that the pods tolerate, as a JSON list.
    """
    place = Placement(cpu, memory, gpu_count, node_selector, tolerations)
    run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    ours = {"store_uri": store_uri, "model_line": model_line, "run_id": run_id}
    recipe = {"method": method, "density": density, "method_config": method_config}
    settled = settle_requests(**ours, **recipe)
    configure(with_signing_key(settled), place, hours=1, retries=SETTLE_RETRIES)
    with dsl.ExitHandler(settled):
        purged = purge_store(store_uri=store_uri, pipeline_root=pipeline_root, dry_run=dry_run, run_id=run_id)
        configure(with_signing_key(purged), place, hours=2)
        claimed = claim_requests(
            **ours,
            **recipe,
            seed=seed,
            policy_uri=policy_uri,
            max_requests=max_requests,
            min_requests=min_requests,
            max_wait_hours=max_wait_hours,
            max_forget_fraction=max_forget_fraction,
            dry_run=dry_run,
        )
        configure(with_signing_key(claimed), place, hours=1)
        with dsl.If(claimed.outputs["requests"] > 0):
            erased = unlearning(
                model_line=model_line,
                forget_manifest_uri=claimed.outputs["forget_manifest_uri"],
                store_uri=store_uri,
                method=claimed.outputs["method"],
                density=claimed.outputs["density"],
                policy_uri=policy_uri,
                method_config=claimed.outputs["method_config"],
                seed=seed,
                retrain_reference=retrain_reference,
                tune=tune,
                tune_budget=tune_budget,
                also=also,
                gpu_count=gpu_count,
                cpu=cpu,  # an argument, because the compiler declares no inputs for limits inside an exit handler
                memory=memory,
                node_selector=node_selector,
                tolerations=tolerations,
            )
            erased.set_caching_options(enable_caching=False)
