"""Step 3 as a component."""

from kfp import dsl

from components._image import component


@component
def unlearn(
    mask: dsl.Input[dsl.Artifact],
    store_uri: str,
    model_line: str,
    run_id: str,
    unlearned: dsl.Output[dsl.Artifact],
    method: str = "default",
    method_config: str = "{}",
    seed: int = 0,
    tune: bool = False,
    tune_budget: str = "20e",
    policy_uri: str = "auto",
    processes: str = "1",
) -> None:
    """Unlearn the forget set; weights outside the mask stay bit-identical.

    Args:
        mask: Reference to the mask, and to the model and the forget set that it was made for.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        unlearned: Reference to the model after unlearning, with the facts of its run.
        method: The unlearning method, such as salun_adaptive or retrain; with tune also auto, or several with commas.
        method_config: Settings that replace the method's defaults, as JSON text.
        seed: Seed of the random labels, the order of the data and the augmentation.
        tune: Search for the settings that method_config leaves open, and for the density, on validation data.
        tune_budget: Budget of the search: passes (200000), time (90s, 15m, 2h) or epochs (20e).
        policy_uri: The gate policy that bounds the search; only read with tune.
        processes: Processes that share the work in this container; a search runs in one.
    """
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference
    from salun_core.tasks.task import TuningOptions

    pod, tuning = Pod(store_uri, model_line, run_id), TuningOptions(tune_budget, policy_uri) if tune else None
    made = steps.unlearn(pod, mask.path, method, method_config, seed, tuning, processes)
    unlearned.metadata.update(write_reference(made, unlearned.path))
