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
    model_line: str = "local",
) -> None:
    """Score every weight on the forget set and keep the most salient ones as a mask of one bit a weight.

    A method that takes no mask gets one in which every weight is salient.

    Args:
        model: The model before unlearning.
        forget_manifest_uri: Address of what is to be forgotten.
        density: Share of the weights to keep salient, above 0 and at most 1.
        mask: The mask: a safetensors file of packed bits.
        method: The unlearning method that will use the mask.
        model_line: Name of the model line, for the metrics.

    Raises:
        UsageError: The density or the method is wrong.
        IntegrityError: The data are of another split than the model's.
    """
    from pathlib import Path

    from salun_core.steps.mask import compute_mask as step

    computed = step(
        Path(model.path), forget_manifest_uri, density, Path(mask.path), method=method, model_line=model_line
    )
    mask.metadata.update(density=computed.density, digest=computed.digest)
