"""The mask of a large forget set: fetch -> score every shard in a pod of its own -> merge -> conclude."""

from typing import Any

from kfp import dsl

from components.fetch_model import fetch_model
from components.merge_scores import merge_scores
from components.score_shard import score_shard
from pipelines.form import pipeline
from pipelines.resources import Size, configure
from pipelines.unlearning import end, run_address
from salun_core.steps.run_form import ShardedMaskForm

NAME = "salun-sharded-mask"


@pipeline(NAME, ShardedMaskForm)
def sharded_mask(form: Any) -> None:  # noqa: ANN401 - kfp's channels have no types
    """Compute a saliency mask in shards, one pod each; the mask has the same bits for any number of shards."""
    run = run_address(form)
    given = {"forget_manifest_uri": form.forget_manifest_uri, "density": form.density, "shards": form.shards}
    fetched = fetch_model(publishes=False, **given, **run)
    configure(fetched, form, hours=1, size=Size.SMALL)
    with dsl.If(fetched.outputs["code"] == 0, name="the input is right"):
        with dsl.ParallelFor(fetched.outputs["shards"], name="shards") as shard:
            scored = score_shard(inputs=fetched.outputs["inputs"], shard=shard, **run)
            configure(scored, form, hours=2, size=Size.GPU, retries=0)  # issue 13897: retries inside a loop
        merged = merge_scores(shards=dsl.Collected(scored.outputs["sums"]), density=form.density, **run)
        configure(merged, form, hours=1)
        end(form, merged)
    with dsl.If(fetched.outputs["code"] > 0, name="the run cannot start"):
        end(form)
