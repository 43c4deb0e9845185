"""Step 2 as a component."""

from kfp import dsl

from components._image import component


@component
def compute_mask(
    inputs: dsl.Input[dsl.Artifact],
    store_uri: str,
    model_line: str,
    run_id: str,
    mask: dsl.Output[dsl.Artifact],
    method: str = "default",
    density: float = 0.5,
    method_config: str = "{}",
    processes: str = "1",
) -> None:
    """Score every weight on the forget set and keep the most salient ones as a mask with one bit per weight.

    For a method that takes no mask it ends at once.

    Args:
        inputs: Reference to the model before unlearning and the forget set.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        mask: Reference to the mask: a safetensors file of packed bits.
        method: The unlearning method that will use the mask.
        density: Share of the weights to keep salient, above 0 and at most 1.
        method_config: Settings that replace the method's defaults, as JSON text; for diffusion models also which part
            is scored, and how.
        processes: Processes that share the work in this container; the mask has the same bits.
    """
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference

    pod = Pod(store_uri, model_line, run_id)
    made = steps.compute_mask(pod, inputs.path, method, density, method_config, processes)
    mask.metadata.update(write_reference(made, mask.path))
