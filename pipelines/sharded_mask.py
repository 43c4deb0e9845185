"""The mask of a large forget set: fetch -> score every shard in a pod of its own -> merge."""

from kfp import dsl

from components.fetch_model import fetch_model
from components.merge_scores import merge_scores
from components.score_shard import score_shard
from pipelines.resources import Placement, configure, pipeline

NAME = "salun-sharded-mask"


@pipeline("salun-score-shard")
def one_shard(
    model: dsl.Input[dsl.Model],
    forget_manifest_uri: str,
    shard: str,
    model_line: str,
    store_uri: str,
    gpu_count: int,
    cpu: str,
    memory: str,
    node_selector: dict[str, str],
    tolerations: list[dict[str, str]],
) -> dsl.Artifact:
    """Score one shard.

    A pipeline of its own, because inside a loop the compiler does not declare the inputs for limits.
    """
    place = Placement(cpu, memory, gpu_count, node_selector, tolerations)
    ours = {"model_line": model_line, "store_uri": store_uri, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    scored = score_shard(model=model, forget_manifest_uri=forget_manifest_uri, shard=shard, **ours)
    configure(scored, place, hours=2, gpu=True, retries=0)  # issue 13897: retries inside a loop
    return scored.outputs["sums"]


@pipeline(NAME)
def sharded_mask(
    model_line: str,
    forget_manifest_uri: str,
    store_uri: str,
    shards: list[str],
    density: float = 0.5,
    gpu_count: int = 1,
    cpu: str = "4",
    memory: str = "16Gi",
    node_selector: dict[str, str] = {},  # noqa: B006 - kfp reads the default and never calls with it
    tolerations: list[dict[str, str]] = [],  # noqa: B006
) -> None:
    """Compute a saliency mask in shards, one pod each; the mask has the same bits for any number of shards.

    Args:
        model_line: Name of the model line; the mask is computed for its HEAD.
        forget_manifest_uri: Address of the forget set: a frozen manifest, a forget target or a list of targets.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        shards: All shards, as a JSON list: ["1/2", "2/2"] for two.
        density: Share of the weights that may change, above 0 and at most 1.
        gpu_count: Accelerators for each shard.
        cpu: Processor cores for each step, such as 4 or 500m.
        memory: Memory for each step, such as 16Gi.
        node_selector: Labels that the nodes must have, as a JSON object.
        tolerations: Taints that the pods tolerate, as a JSON list.
    """
    place = Placement(cpu, memory, gpu_count, node_selector, tolerations)
    forget = forget_manifest_uri
    ours = {"model_line": model_line, "store_uri": store_uri, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    fetched = fetch_model(forget_manifest_uri=forget, **ours)
    configure(fetched, place, hours=1)
    before = fetched.outputs["model"]
    with dsl.ParallelFor(shards, name="shards") as shard:
        scored = one_shard(
            model=before,
            forget_manifest_uri=forget,
            shard=shard,
            model_line=model_line,
            store_uri=store_uri,
            gpu_count=gpu_count,
            cpu=cpu,
            memory=memory,
            node_selector=node_selector,
            tolerations=tolerations,
        )
        scored.set_caching_options(enable_caching=False)
    merged = merge_scores(
        model=before,
        forget_manifest_uri=forget,
        shards=dsl.Collected(scored.output),
        density=density,
        **ours,
    )
    configure(merged, place, hours=1)
