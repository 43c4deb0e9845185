"""The demo of generation: a small diffusion model of real images forgets one class, through requests and pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from salun_core.checkout import load_example
from salun_core.config import load
from salun_core.data import DataSpec, load_data
from salun_core.data.forget_set import ClassTarget
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.methods.loop import OnEpoch
from salun_core.models.card import DiffusionEvaluation
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import summarise
from salun_core.steps.demo_line import ACTOR, Filed, Say, collect, free_line, head, look, sweep
from salun_core.steps.publishing import DECISION, EVIDENCE
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.storage import FileStore, open_store
from salun_core.tasks.classification.training import register_model, train_model, training_config
from salun_core.tasks.diffusion.importing import MadeDiffusion, register_diffusion
from salun_core.times import utc_clock

Kind = Literal["stable-diffusion", "ddpm"]

FORGOTTEN = "sneaker"
_JUDGE = {"epochs": 4, "learning_rate": 0.1}
_JUDGES_IMAGES = {"size": 16, "channels": 1}  # generated ones are shrunk to these: a quarter of the work, as sure
_SIZES: dict[Kind, dict[str, Any]] = {
    "stable-diffusion": {"size": 32, "channels": 3, "train_limit": 20_000, "test_limit": 2000},
    "ddpm": {"size": 16, "channels": 1, "train_limit": 20_000, "test_limit": 2000},
}
_EVALUATIONS: dict[Kind, DiffusionEvaluation] = {
    "stable-diffusion": DiffusionEvaluation(guidance_scale=5.0, images_per_class=60),
    "ddpm": DiffusionEvaluation(guidance_scale=1.5, images_per_class=60),
}


Progress = Callable[[str, int], AbstractContextManager[OnEpoch]]
"""Shows so many epochs of something that is named."""


@dataclass(frozen=True)
class DiffusionOutcome:
    """What the demo made.

    Args:
        line: the model line.
        parent: digest of the version that was trained.
        version: digest of HEAD afterwards: the new version, or the parent if the gate refused.
        evidence: what was measured.
        decision: the gate's answer.
        seconds: wall clock: judge, train, sweep.
        request: the deletion request.
        files: report, evidence and decision by name.
    """

    line: str
    parent: str
    version: str
    evidence: Evidence
    decision: GateDecision
    seconds: Mapping[str, float]
    request: Filed
    files: Mapping[str, Path]


def diffusion_spec(kind: Kind, data: DataSpec) -> DataSpec:
    """Return the demo's data in the size that its model has."""
    sizes = {name: value for name, value in _SIZES[kind].items() if getattr(data, name) is None}
    return data.model_copy(update=sizes)


def run_diffusion_demo(
    work: Path, store_uri: str, kind: Kind, data: DataSpec, forget: str, say: Say, progress: Progress
) -> DiffusionOutcome:
    """Train a judge and a diffusion model, file a request, sweep, and verify the certificate.

    Args:
        work: the demo's folder.
        store_uri: of a store that runs.
        kind: which model.
        data: Fashion-MNIST, or other labelled images.
        forget: name of the class that is to be forgotten.
        say: called with each line of progress.
        progress: shows the epochs of the trainings.

    Returns:
        What was made; look at `decision.passed`.

    Raises:
        SalunError: a step failed; the request is queued again.
    """
    store, spec = open_store(store_uri), diffusion_spec(kind, data)
    split = load_data(spec).split
    target = ClassTarget(dataset_digest=split.dataset_digest, class_id=forget)
    judge, seconds = _judge(store, spec, work, say, progress)
    line = free_line(store, kind)
    started = time.perf_counter()
    made = _train(kind, spec, work / "model", _EVALUATIONS[kind].model_copy(update={"judge": judge}), progress)
    seconds["train"] = time.perf_counter() - started
    say(f"trained {kind} with {made.parameters:,} parameters in {seconds['train']:.0f} s")
    parent = register_diffusion(store, line, work / "model", "train", len(split.train))
    request = f"{line}-{forget.replace(' ', '-')}"
    ledger = Ledger(store, utc_clock)
    ledger.submit(request, line, target, source="demo", actor=ACTOR)
    say(f"filed the deletion request {request}: {summarise(target)}")
    config = DeletionSweepForm(model_line=line, store_uri=store_uri, min_requests=1)
    started = time.perf_counter()
    sweep(config, work / "sweep", "the", say)
    seconds["sweep"] = time.perf_counter() - started
    files = collect(store, line, parent, work)
    filed = look(store, ledger, request, summarise(target), work, parent, say)
    decision, evidence = load(GateDecision, files[DECISION]), load(Evidence, files[EVIDENCE])
    return DiffusionOutcome(line, parent, head(store, line).digest, evidence, decision, seconds, filed, files)


def _judge(store: FileStore, spec: DataSpec, work: Path, say: Say, progress: Progress) -> tuple[str, dict[str, float]]:
    """Train the classifier that will judge the images, as a model line of its own."""
    config, line = training_config(_JUDGE), free_line(store, "judge")
    spec = spec.model_copy(update=_JUDGES_IMAGES)
    started = time.perf_counter()
    with progress("judge", config.epochs) as on_epoch:
        made = train_model(spec, "resnet8", config, work / "judge", on_epoch=on_epoch)
    seconds = time.perf_counter() - started
    say(f"trained the judge in {seconds:.0f} s: {made.test_accuracy:.1%} right in test")
    version = register_model(store, line, work / "judge", "train", len(load_data(spec).split.train))
    return f"{line}@{version}", {"judge": seconds}


def _train(kind: Kind, spec: DataSpec, out: Path, judged: DiffusionEvaluation, progress: Progress) -> MadeDiffusion:
    example = load_example("small_diffusion")
    recipe = example.resolve_recipe(kind)
    with progress(kind, recipe.epochs) as on_epoch:
        made: MadeDiffusion = example.train(spec, recipe, out, judged, on_epoch=on_epoch)
        return made
