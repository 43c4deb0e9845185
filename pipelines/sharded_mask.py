"""The mask of a large forget set: fetch -> score every shard in a pod of its own -> merge."""

from types import SimpleNamespace
from typing import Any

from kfp import dsl

from components.fetch_model import fetch_model
from components.merge_scores import merge_scores
from components.score_shard import score_shard
from pipelines.form import PLACEMENT, pipeline
from pipelines.resources import configure
from salun_core.steps.run_form import ShardedMaskForm

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
    place = SimpleNamespace(
        cpu=cpu, memory=memory, gpu_count=gpu_count, node_selector=node_selector, tolerations=tolerations
    )
    ours = {"model_line": model_line, "store_uri": store_uri, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    scored = score_shard(model=model, forget_manifest_uri=forget_manifest_uri, shard=shard, **ours)
    configure(scored, place, hours=2, gpu=True, retries=0)  # issue 13897: retries inside a loop
    return scored.outputs["sums"]


@pipeline(NAME, ShardedMaskForm)
def sharded_mask(form: Any) -> None:  # noqa: ANN401 - kfp's channels have no types
    """Compute a saliency mask in shards, one pod each; the mask has the same bits for any number of shards."""
    common = {
        "model_line": form.model_line,
        "store_uri": form.store_uri,
        "forget_manifest_uri": form.forget_manifest_uri,
    }
    run = {"run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER, **common}
    fetched = fetch_model(**run)
    configure(fetched, form, hours=1)
    before = fetched.outputs["model"]
    with dsl.ParallelFor(form.shards, name="shards") as shard:
        place = {name: getattr(form, name) for name in PLACEMENT}
        scored = one_shard(model=before, shard=shard, **common, **place)
        scored.set_caching_options(enable_caching=False)
    merged = merge_scores(model=before, shards=dsl.Collected(scored.output), density=form.density, **run)
    configure(merged, form, hours=1)
