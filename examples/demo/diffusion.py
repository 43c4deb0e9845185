"""A small diffusion model of real images forgets one class, by a deletion request and the pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from examples import small_diffusion
from examples.demo.stage import DemoOutcome, Progress, ShowEpochs, Stage, free_line
from salun_core.data import DataSpec, load_data
from salun_core.data.targets import ClassTarget
from salun_core.models.card import DiffusionEvaluation
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.storage import open_store
from salun_core.tasks import register_model
from salun_core.tasks.classification.training import train_model, training_config

Kind = Literal["stable-diffusion", "ddpm"]

DATA = "fashion-mnist"
_JUDGE = {"epochs": 4, "learning_rate": 0.1}
_JUDGES_IMAGES = {
    "size": 16,
    "channels": 1,
}  # generated images are shrunk to these: as accurate at a quarter of the cost
_SIZES: dict[Kind, dict[str, Any]] = {
    "stable-diffusion": {"size": 32, "channels": 3, "train_limit": 20_000, "test_limit": 2000},
    "ddpm": {"size": 16, "channels": 1, "train_limit": 20_000, "test_limit": 2000},
}
_EVALUATIONS: dict[Kind, DiffusionEvaluation] = {
    "stable-diffusion": DiffusionEvaluation(guidance_scale=5.0, images_per_class=60),
    "ddpm": DiffusionEvaluation(guidance_scale=1.5, images_per_class=60),
}


def diffusion_spec(kind: Kind, data: DataSpec) -> DataSpec:
    """Return the demo's data in the size of its model."""
    sizes = {name: value for name, value in _SIZES[kind].items() if getattr(data, name) is None}
    return data.model_copy(update=sizes)


def run_diffusion_demo(
    work: Path, store_uri: str, kind: Kind, spec: DataSpec, forget: str, progress: Progress, show_epochs: ShowEpochs
) -> DemoOutcome:
    """Train a judge and a diffusion model, file a request, sweep, and verify the certificate; see `decision.passed`.

    SalunError: a step failed; the request is queued again.
    """
    split = load_data(spec).split
    target = ClassTarget(dataset_digest=split.dataset_digest, class_id=forget)
    judge, seconds = _train_judge(store_uri, spec, work, progress, show_epochs)
    stage = Stage(work, store_uri, kind, progress)
    started = time.perf_counter()
    recipe, evaluation = small_diffusion.resolve_recipe(kind), _EVALUATIONS[kind]
    with show_epochs(kind, recipe.epochs) as on_epoch:
        evaluation = evaluation.model_copy(update={"judge": judge})
        made = small_diffusion.train(spec, recipe, work / "model", evaluation, on_epoch=on_epoch)
    seconds["train"] = time.perf_counter() - started
    progress(f"trained {kind} with {made.parameters:,} parameters in {seconds['train']:.0f} s")
    stage.publish(len(split.train))
    named = stage.file({forget.replace(" ", "-"): target})
    started = time.perf_counter()
    stage.sweep(DeletionSweepForm(model_line=stage.line, store_uri=store_uri, min_requests=1), "the", work / "sweep")
    seconds["sweep"] = time.perf_counter() - started
    return stage.outcome(named, seconds)


def _train_judge(
    store_uri: str, spec: DataSpec, work: Path, progress: Progress, show_epochs: ShowEpochs
) -> tuple[str, dict[str, float]]:
    """Train the classifier of the generated images, as a model line of its own."""
    store, config = open_store(store_uri), training_config(_JUDGE)
    line, spec = free_line(store, "judge"), spec.model_copy(update=_JUDGES_IMAGES)
    started = time.perf_counter()
    with show_epochs("judge", config.epochs) as on_epoch:
        made = train_model(spec, "resnet8", config, work / "judge", on_epoch=on_epoch)
    seconds = time.perf_counter() - started
    progress(f"trained the judge in {seconds:.0f} s: accuracy {made.test_accuracy:.1%} in test")
    version = register_model(store, line, work / "judge", "train", len(load_data(spec).split.train))
    return f"{line}@{version}", {"judge": seconds}
