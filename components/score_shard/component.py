"""One shard of step 2 as a component."""

from kfp import dsl

from components._image import component


@component
def score_shard(
    model: dsl.Input[dsl.Model],
    forget_manifest_uri: str,
    shard: str,
    sums: dsl.Output[dsl.Artifact],
    model_line: str = "local",
    store_uri: str = "",
    run_id: str = "",
) -> None:
    """Sum the gradients of one shard of the forget set, to be merged into a mask.

    Args:
        model: The model before unlearning.
        forget_manifest_uri: Address of the forget set.
        shard: Number of the shard and number of all shards, such as 2/8.
        sums: The sums of the shard's gradients: a safetensors file.
        model_line: Name of the model line, for the metrics.
        store_uri: The object store of the deletion ledger, as s3://bucket/prefix; empty without a ledger.
        run_id: Id of the run, to record its progress in the ledger.

    Raises:
        UsageError: The shard is malformed.
        IntegrityError: The data belong to another split than the model.
        ConflictError: The run has ended: another run settled it.
    """
    from pathlib import Path

    from salun_core.saliency.scores import Shard
    from salun_core.steps.context import RunContext
    from salun_core.steps.mask import score_shard as step

    context = RunContext(Path(model.path), forget_manifest_uri, model_line, store_uri, run_id)
    header = step(context, Shard.parse(shard), Path(sums.path))
    sums.metadata.update(shard=shard, seconds=header.seconds)
