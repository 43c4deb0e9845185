"""Evaluation of a diffusion model: image classifiers and extractors, sampling, and the evidence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.families import family_of
from salun_core.diffusion.sampling import Sampler, images
from salun_core.digest import sha256_file
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation.evidence import Evidence, Forgotten, Measured, RunFacts
from salun_core.evaluation.generated_images import Evaluators, Sample, SamplingPlan, evaluate_generated_images
from salun_core.evaluation.image_classifier import ImageClassifier, fitted
from salun_core.methods.diffusion import diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.models.checkpoint import model_digest
from salun_core.models.diffusers_folder import LoadedDiffusion, load_diffusion, model_files
from salun_core.saliency import SaliencyMask
from salun_core.tasks.diffusion.examples import build_example_sets
from salun_core.tasks.diffusion.inputs import (
    DiffusionInputs,
    class_names,
    forgotten_prompts,
    label_of,
    watched_prompts,
)
from salun_core.tasks.diffusion.robustness import RobustnessResult, Studio, aftermath
from salun_core.tasks.resolve import model_folder

if TYPE_CHECKING:
    from salun_core.models import LoadedModel
    from salun_core.models.diffusers_folder import LoadedDiffusion
    from salun_core.steps.evaluation import Reference


@dataclass(frozen=True)
class Candidate:
    """The model after, with how it was made.

    Args:
        model: it.
        facts: of its run.
        mask: that it was made with; None where its method took none.
    """

    model: LoadedDiffusion
    facts: RunFacts
    mask: SaliencyMask | None


def measure(
    inputs: DiffusionInputs,
    candidate: Candidate,
    evaluators: Evaluators,
    device: torch.device,
    reference: Denoiser | None = None,
) -> Evidence:
    """Generate with both models from the same seeds and judge the images.

    Args:
        inputs: the model before, its data, the forget set.
        candidate: the model after.
        evaluators: who looks at the images.
        device: to compute on.
        reference: a model that was trained without the set.

    Returns:
        The evidence.

    Raises:
        ModelError: the models do not fit each other, or an image is not finite.
    """
    family, card = inputs.family(device), inputs.card
    before, after = family.denoiser, family_of(candidate.model, device).denoiser
    sampler = family.sampler(card.evaluation)
    plan = plan_of(inputs, evaluators.classifier, sampler)
    table = family.conditions(inputs.rows.names).to(device)
    at = [inputs.rows.of(name) for name in plan.rows]

    def drawn(denoiser: Denoiser) -> Sample:
        def sample(rows: Sequence[int], seeds: Sequence[int]) -> Iterator[Tensor]:
            return images(denoiser, table, sampler, [at[row] for row in rows], seeds, family.decode)

        return sample

    later = RobustnessResult()
    if evaluators.classifier is not None:
        later = aftermath(Studio(inputs, family, table, sampler, plan, evaluators.classifier), after, device)
    evidence = evaluate_generated_images(
        drawn(before),
        drawn(after),
        (before.network, after.network),
        plan,
        evaluators,
        Measured(
            before=inputs.original.digest,
            after=candidate.model.digest,
            reference=model_digest(reference.network) if reference else None,
            dataset=inputs.split.dataset_digest,
            split=inputs.split.digest,
            forget_set=inputs.forget_set.digest,
            mask=candidate.mask.digest if candidate.mask else None,
        ),
        forgotten(inputs),
        candidate.mask,
        candidate.facts,
        extra=later.metrics,
        resurgence=later.resurgence,
        reference=drawn(reference) if reference else None,
    )
    assert evidence.generation is not None
    return evidence.model_copy(update={"generation": evidence.generation.model_copy(update={"task": card.task})})


def forgotten(inputs: DiffusionInputs) -> Forgotten:
    """Describe a forget set: images of classes, and as many as each concept generates, beside all there were."""
    generated = sum(concept.images for concept in inputs.forget_set.concepts)
    return Forgotten(
        count=len(inputs.forget_set.samples) + generated,
        train_count=len(inputs.split.train) + 2 * generated,
        kinds=inputs.forget_set.kinds,
        classes=inputs.forget_set.classes,
    )


def plan_of(inputs: DiffusionInputs, judge: ImageClassifier | None, sampler: Sampler) -> SamplingPlan:
    """Choose the rows of images: all classes that the model still knows, and every prompt that was named.

    Args:
        inputs: model and forget set.
        judge: its classes are matched with ours by name.
        sampler: how images are drawn.
    """
    card, settings = inputs.card, inputs.card.evaluation
    gone = forgotten_prompts(card, inputs.forget_set)
    classes = class_names(card)
    known = {*inputs.kept_classes, *inputs.forget_set.classes}
    rows = [name for label, name in enumerate(classes) if label in known]
    rows += [name for name in inputs.rows.names if name not in classes]
    near = {*settings.neighbours, *(text for concept in inputs.forget_set.concepts for text in concept.neighbours)}
    watched = {*watched_prompts(card)}
    near |= {classes[card.classes.index(name)] for name in settings.neighbours if name in card.classes}
    names = list(judge.classes) if judge else []
    labels = [_judged(label_of(name, card), card.classes, names) for name in rows]
    return SamplingPlan(
        rows=rows,
        forgotten=[index for index, name in enumerate(rows) if name in gone],
        labels=labels,
        neighbours=[index for index, name in enumerate(rows) if name in near and name not in gone],
        watched=[index for index, name in enumerate(rows) if name in watched and name not in gone],
        per_row=settings.images_per_class,
        seed=settings.seed,
        sampler=sampler.name,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        blur=settings.suite == "nsfw",
        title="classes" if card.task == "class-conditional" else "prompts",
    )


def _judged(label: int | None, ours: Sequence[str], names: Sequence[str]) -> int | None:
    if label is None or ours[label] not in names:
        return None
    return list(names).index(ours[label])


def real_images(inputs: DiffusionInputs) -> Tensor | None:
    """Return held-out images of the kept classes, uint8 [N, C, H, W] of the model's size; None without data."""
    data, card = inputs.data, inputs.card
    if data is None:
        return None
    table, kept = data.table, set(inputs.kept_classes)
    ids = [name for name in data.split.ids("test") if table.labels[table.position[name]] in kept]
    return fitted(data.pixels(ids[: card.evaluation.real_images]), card.channels, card.height, card.width)


def retrained(inputs: DiffusionInputs, device: torch.device) -> Denoiser:
    """Train a denoiser without the forget set, by the recipe on the model card."""
    known = {name: value for name, value in inputs.card.training.items() if name in DiffusionConfig.model_fields}
    config = diffusion_config("retrain", {**known, "device": str(device)})
    sets, denoiser = build_example_sets(inputs, config, device), inputs.family(device).denoiser
    return denoiser.of(unlearn_denoiser(denoiser, sets, "retrain", config=config).model)


def evaluators_of(inputs: DiffusionInputs, judge: Path | None) -> Evaluators:
    """Open who looks at the images, as the model card asks.

    Args:
        inputs: the model with its evaluation settings.
        judge: folder of the classifier that judges.

    Raises:
        UsageError: something that the card names does not exist.
    """
    from salun_core.evaluation.clip_score import ClipScorer
    from salun_core.evaluation.image_features import classifier_extractor, inception_extractor
    from salun_core.evaluation.nudity import NudityDetector
    from salun_core.models import load_model

    settings = inputs.card.evaluation
    judging = ImageClassifier.of(load_model(judge)) if judge else None
    extractor = None
    if settings.extractor not in ("judge", "none"):
        extractor = inception_extractor(Path(settings.extractor))
    elif settings.extractor == "judge" and judging is not None:
        extractor = classifier_extractor(judging)
    return Evaluators(
        classifier=judging,
        extractor=extractor,
        real=real_images(inputs) if extractor else None,
        clip=ClipScorer.load(Path(settings.clip)) if settings.clip else None,
        detector=NudityDetector.load() if settings.suite == "nsfw" else None,
    )


def evaluate_images(
    inputs: DiffusionInputs,
    candidate: LoadedModel | LoadedDiffusion,
    facts: RunFacts,
    mask: SaliencyMask | None,
    wish: Reference,
    store_uri: str | None,
    device: torch.device,
) -> Evidence:
    """Evaluate a diffusion model against the original, by the classifier and the metrics that the model card names.

    Args:
        inputs: the model before, its data, the forget set.
        candidate: the model after.
        facts: how it was made.
        mask: that it was made with.
        wish: what to compare with beside the model before.
        store_uri: of the store that holds the judge's model line.
        device: to compute on.

    Raises:
        UsageError: the judge cannot be found, or the model after is a classifier.
    """
    if not isinstance(candidate, LoadedDiffusion):
        raise UsageError(
            "the model after is a classifier", "the one before is a diffusion model", "compare like with like"
        )
    require_same_parts(inputs.original, candidate)
    named = inputs.card.evaluation.judge
    with ExitStack() as stack:
        judge = stack.enter_context(model_folder(named, store_uri)) if named else None
        evaluators = evaluators_of(inputs, judge)
        started, reference = time.perf_counter(), None
        if wish.folder is not None:
            reference = family_of(load_diffusion(wish.folder), device).denoiser
        elif wish.retrain:
            reference = retrained(inputs, device)
            seconds = {**facts.seconds, "reference": time.perf_counter() - started}
            facts = facts.model_copy(update={"seconds": seconds})
        return measure(inputs, Candidate(candidate, facts, mask), evaluators, device, reference)


def require_same_parts(original: LoadedDiffusion, candidate: LoadedDiffusion) -> None:
    """Check that nothing but the denoiser changed: no other component is unlearned, or compared bit by bit.

    Raises:
        ModelError: a file of another component differs, is missing or was added.
    """
    before, after = (_other_files(model) for model in (original, candidate))
    differing = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if differing:
        raise ModelError(
            "the two models differ in more than the denoiser",
            ", ".join(differing[:5]),
            "compare a model with its own child",
        )


def _other_files(model: LoadedDiffusion) -> dict[str, str]:
    folder, own = model.components.folder, f"{model.components.denoiser_name}/"
    names = [name for name in model_files(folder) if not name.startswith(own)]
    return {name: sha256_file(folder / name) for name in names}
