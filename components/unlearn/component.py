"""Step 3 as a component."""

from kfp import dsl

from components._image import component


@component
def unlearn(
    model: dsl.Input[dsl.Model],
    mask: dsl.Input[dsl.Artifact],
    forget_manifest_uri: str,
    unlearned: dsl.Output[dsl.Model],
    method: str = "salun",
    method_config: str = "{}",
    seed: int = 0,
    model_line: str = "local",
    store_uri: str = "",
    run_id: str = "",
    tune: bool = False,
    tune_budget: str = "20e",
    policy_uri: str = "auto",
    processes: int = 1,
) -> None:
    """Unlearn the forget set; weights outside the mask stay bit-identical.

    Args:
        model: The model before unlearning.
        mask: The mask of this model and this forget set.
        forget_manifest_uri: Address of the forget set.
        unlearned: The model after unlearning, with the facts of its run.
        method: The unlearning method: salun, random_label, retrain, finetune or gradient_ascent.
        method_config: Settings that replace the method's defaults, as JSON text.
        seed: Seed of the random labels, the order of the data and the augmentation.
        model_line: Name of the model line, for the metrics.
        store_uri: The object store of the deletion ledger, as s3://bucket/prefix; empty without a ledger.
        run_id: Id of the run, to record its progress in the ledger.
        tune: Search for the settings that method_config leaves open, and for the density, on validation data.
        tune_budget: Budget of the search: passes (200000), time (90s, 15m, 2h) or epochs (20e).
        policy_uri: The gate policy that bounds the search; only read with tune.
        processes: Processes that share the work in this container; a search runs in one.

    Raises:
        UsageError: The method or its configuration is wrong.
        GateRefusedError: The search found no setting within the policy; nothing is written.
        IntegrityError: The mask belongs to another model or forget set.
        ModelError: The loss became NaN or infinite.
        ConflictError: The run has ended: another run settled it.
    """
    from pathlib import Path

    from salun_core.methods.recipe import parse_recipe
    from salun_core.steps.context import RunContext
    from salun_core.steps.processes import in_processes
    from salun_core.steps.unlearning import run_unlearning
    from salun_core.tasks.run_facts import read_run_facts
    from salun_core.tasks.task import TuningOptions

    context = RunContext(Path(model.path), forget_manifest_uri, model_line, store_uri, run_id)
    recipe = parse_recipe(method, 1.0, method_config, seed)  # the mask carries the density
    tuning, paths = TuningOptions(tune_budget, policy_uri) if tune else None, (Path(mask.path), Path(unlearned.path))
    in_processes(1 if tune else processes, run_unlearning, context, recipe, *paths, tuning=tuning)
    seconds = read_run_facts(Path(unlearned.path), method).seconds["unlearn"]
    unlearned.metadata.update(method=method, seed=seed, seconds=seconds)
