"""The unlearning pipeline: fetch -> mask -> unlearn -> evaluate -> gate & publish."""

from kfp import dsl

from components.compute_mask import compute_mask
from components.evaluate import evaluate
from components.fetch_model import fetch_model
from components.gate_publish import gate_publish
from components.unlearn import unlearn
from pipelines.resources import Placement, configure, pipeline

NAME = "salun-unlearning"


@pipeline(NAME)
def unlearning(
    model_line: str,
    forget_manifest_uri: str,
    store_uri: str,
    method: str = "salun",
    density: float = 0.5,
    policy_uri: str = "auto",
    method_config: str = "{}",
    seed: int = 0,
    retrain_reference: bool = False,
    tune: bool = False,
    tune_budget: str = "20e",
    also: str = "",
    gpu_count: int = 1,
    cpu: str = "4",
    memory: str = "16Gi",
    node_selector: dict[str, str] = {},  # noqa: B006 - kfp reads the default and never calls with it
    tolerations: list[dict[str, str]] = [],  # noqa: B006
) -> None:
    """Forget a part of the training data and publish the new model, if the gate passes it.

    Args:
        model_line: Name of the model line; its HEAD is unlearned, and replaced if the gate passes.
        forget_manifest_uri: Address of the forget set: a frozen manifest, a forget target or a list of targets.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        method: The unlearning method: salun, random_label, retrain, finetune or gradient_ascent; of diffusion models
            also esd, forget_me_not and uce.
        density: Share of the weights that may change, above 0 and at most 1.
        policy_uri: The gate policy: auto (by the kind of model), a shipped policy's name, or an s3:// address.
        method_config: Settings that replace the method's defaults, as JSON text such as {"epochs": 5}.
        seed: Seed of the random labels, the order of the data and the augmentation.
        retrain_reference: Also train a model from scratch without the forget set, and compare with it. Slow.
        tune: Search for density and settings on validation data, within the policy's margins; classifiers only.
        tune_budget: Budget of the search: passes (200000), time (90s, 15m, 2h) or epochs (20e).
        also: Extra metrics, such as lira=16,relearn,probe,decile,seeds=3; with a reference also kl,tow.
        gpu_count: Accelerators for each of the steps that compute; mask and unlearning run one process on each.
        cpu: Processor cores for each step, such as 4 or 500m.
        memory: Memory for each step, such as 16Gi.
        node_selector: Labels that the nodes must have, as a JSON object.
        tolerations: Taints that the pods tolerate, as a JSON list.
    """
    place = Placement(cpu, memory, gpu_count, node_selector, tolerations)
    forget, line = forget_manifest_uri, model_line
    ours = {"model_line": line, "store_uri": store_uri, "run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    fetched = fetch_model(forget_manifest_uri=forget, **ours)
    before = fetched.outputs["model"]
    recipe = {"method": method, "method_config": method_config}
    masked = compute_mask(
        model=before, forget_manifest_uri=forget, density=density, processes=gpu_count, **recipe, **ours
    )
    mask = masked.outputs["mask"]
    unlearned = unlearn(
        model=before,
        mask=mask,
        forget_manifest_uri=forget,
        seed=seed,
        tune=tune,
        tune_budget=tune_budget,
        policy_uri=policy_uri,
        processes=gpu_count,
        **recipe,
        **ours,
    )
    after = unlearned.outputs["unlearned"]
    measured = evaluate(
        before=before,
        after=after,
        mask=mask,
        forget_manifest_uri=forget,
        retrain_reference=retrain_reference,
        also=also,
        **ours,
    )
    published = gate_publish(
        before=before,
        after=after,
        mask=mask,
        evidence=measured.outputs["evidence"],
        forget_manifest_uri=forget,
        parent=fetched.outputs["Output"],
        policy_uri=policy_uri,
        **ours,
    )
    configure(fetched, place, hours=1)
    configure(masked, place, hours=2, gpu=True)
    configure(unlearned, place, hours=24, gpu=True)
    configure(measured, place, hours=24, gpu=True)
    configure(published, place, hours=1)
