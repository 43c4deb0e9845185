"""Step 1 as a component."""

from typing import NamedTuple

from kfp import dsl

from components._image import component


@component
def fetch_model(
    store_uri: str,
    model_line: str,
    run_id: str,
    forget_manifest_uri: str,
    inputs: dsl.Output[dsl.Artifact],
    method: str = "default",
    density: float = 0.5,
    policy_uri: str = "auto",
    method_config: str = "{}",
    seed: int = 0,
    retrain_reference: bool = False,
    tune: bool = False,
    tune_budget: str = "20e",
    extra_metrics: str = "",
    evaluation_samples: str = "20000",
) -> NamedTuple("Outputs", [("code", int)]):  # type: ignore[valid-type]
    """Check the run form, and fix what the run works on: HEAD of the model line, and the samples to forget.

    Args:
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        forget_manifest_uri: Address of the forget set: a frozen manifest, a forget target or a list of targets.
        inputs: Reference to the model before unlearning and the forget set.
        method: The unlearning method.
        density: Share of the weights that may change.
        policy_uri: The gate policy.
        method_config: Settings that replace the method's defaults, as JSON text.
        seed: Seed of the run.
        retrain_reference: Whether the evaluation also trains a model without the forget set.
        tune: Whether settings and density are searched for.
        tune_budget: Budget of the search.
        extra_metrics: Extra metrics of the evaluation.
        evaluation_samples: Most retained and most test images that the evaluation measures, or all.

    Returns:
        code: 0, or the exit code of the run's outcome if it cannot start.
    """
    given = dict(locals())
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference

    found, code = steps.fetch_model(Pod(store_uri, model_line, run_id), given)
    inputs.metadata.update(write_reference(found, inputs.path))
    return (code,)
