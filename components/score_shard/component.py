"""One shard of step 2 as a component."""

from kfp import dsl

from components._image import component


@component
def score_shard(
    inputs: dsl.Input[dsl.Artifact],
    store_uri: str,
    model_line: str,
    run_id: str,
    shard: str,
    sums: dsl.Output[dsl.Artifact],
) -> None:
    """Sum the gradients of one shard of the forget set, to be merged into a mask.

    Args:
        inputs: Reference to the model before unlearning and the forget set.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        shard: Number of the shard and number of all shards, such as 2/8.
        sums: Reference to the sums of the shard's gradients.
    """
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference

    made = steps.score_shard(Pod(store_uri, model_line, run_id), inputs.path, shard)
    sums.metadata.update(write_reference(made, sums.path))
