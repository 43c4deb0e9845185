"""Step 2 as a component."""

from kfp import dsl

from components._image import component


@component
def compute_mask(
    model: dsl.Input[dsl.Model],
    forget_manifest_uri: str,
    density: float,
    mask: dsl.Output[dsl.Artifact],
    method: str = "salun",
    method_config: str = "{}",
    model_line: str = "local",
    store_uri: str = "",
    run_id: str = "",
    processes: int = 1,
) -> None:
    """Score every weight on the forget set and keep the most salient ones as a mask with one bit per weight.

    A method that takes no mask gets one in which every weight is salient.

    Args:
        model: The model before unlearning.
        forget_manifest_uri: Address of the forget set.
        density: Share of the weights to keep salient, above 0 and at most 1.
        mask: The mask: a safetensors file of packed bits.
        method: The unlearning method that will use the mask.
        method_config: Settings that replace the method's defaults, as JSON text; for diffusion models also which part
            is scored, and how.
        model_line: Name of the model line, for the metrics.
        store_uri: The object store of the deletion ledger, as s3://bucket/prefix; empty without a ledger.
        run_id: Id of the run, to record its progress in the ledger.
        processes: Processes that share the work in this container; the mask has the same bits.

    Raises:
        UsageError: The density or the method is wrong.
        IntegrityError: The data belong to another split than the model.
        ConflictError: The run has ended: another run settled it.
    """
    from pathlib import Path

    from salun_core.methods.recipe import parse_recipe
    from salun_core.saliency import SaliencyMask
    from salun_core.steps.context import RunContext
    from salun_core.steps.mask import compute_mask as step
    from salun_core.steps.processes import in_processes

    context = RunContext(Path(model.path), forget_manifest_uri, model_line, store_uri, run_id)
    in_processes(processes, step, context, parse_recipe(method, density, method_config), Path(mask.path))
    computed = SaliencyMask.load(mask.path)
    mask.metadata.update(density=computed.density, digest=computed.digest)
