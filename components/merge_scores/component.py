"""The end of a sharded step 2 as a component."""

from typing import List  # noqa: UP035 - kfp knows the type by this name

from kfp import dsl

from components._image import component


@component
def merge_scores(
    shards: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    store_uri: str,
    model_line: str,
    run_id: str,
    mask: dsl.Output[dsl.Artifact],
    density: float = 0.5,
) -> None:
    """Sum the shards and keep the most salient weights; the mask equals that of one process.

    Args:
        shards: References to the sums of all shards, in any order.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        mask: Reference to the mask: a safetensors file of packed bits.
        density: Share of the weights to keep salient, above 0 and at most 1.
    """
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference

    pod = Pod(store_uri, model_line, run_id)
    made = steps.merge_scores(pod, [shard.path for shard in shards], density)
    mask.metadata.update(write_reference(made, mask.path))
