"""The end of a sharded step 2 as a component."""

from typing import List  # noqa: UP035 - kfp knows the type by this name

from kfp import dsl

from components._image import component


@component
def merge_scores(
    model: dsl.Input[dsl.Model],
    forget_manifest_uri: str,
    shards: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    density: float,
    mask: dsl.Output[dsl.Artifact],
    model_line: str = "local",
    store_uri: str = "",
    run_id: str = "",
) -> None:
    """Sum the shards and keep the most salient weights; the mask equals that of one process.

    Args:
        model: The model before unlearning.
        forget_manifest_uri: Address of the forget set.
        shards: The sums of all shards, in any order.
        density: Share of the weights to keep salient, above 0 and at most 1.
        mask: The mask: a safetensors file of packed bits.
        model_line: Name of the model line, for the metrics.
        store_uri: The object store of the deletion ledger, as s3://bucket/prefix; empty without a ledger.
        run_id: Id of the run, to record its progress in the ledger.

    Raises:
        UsageError: A shard is missing or given twice, or the density is wrong.
        IntegrityError: A shard is damaged, or belongs to another model or forget set.
        ConflictError: The run has ended: another run settled it.
    """
    from pathlib import Path

    from salun_core.steps.context import RunContext
    from salun_core.steps.mask import merge_scores as step

    context = RunContext(Path(model.path), forget_manifest_uri, model_line, store_uri, run_id)
    merged = step(context, [Path(shard.path) for shard in shards], density, Path(mask.path))
    mask.metadata.update(density=merged.density, digest=merged.digest)
