"""Evaluation of a diffusion model: image classifiers and extractors, sampling, and the evidence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salun_core.data.images import fitted
from salun_core.diffusion.families import family_of
from salun_core.diffusion.sampling import Sampler
from salun_core.digest import sha256_file
from salun_core.errors import ModelError
from salun_core.evaluation.evidence import Evidence
from salun_core.evaluation.generated_images import Comparison, Evaluators, SamplingPlan, evaluate_generated_images
from salun_core.evaluation.image_classifier import Calibration, ImageClassifier
from salun_core.models.card import DiffusionCard
from salun_core.models.diffusers_folder import TEXT_ENCODER, LoadedDiffusion, model_files
from salun_core.tasks.diffusion.inputs import (
    DiffusionInputs,
    class_names,
    forgotten_prompts,
    harmless_prompts,
    label_of,
    watched_prompts,
)
from salun_core.tasks.diffusion.robustness import ImageGenerator, RobustnessResult, measure_robustness
from salun_core.tasks.reference import reference_model
from salun_core.tasks.resolve import model_folder
from salun_core.tasks.task import Candidate, EvaluationOptions

if TYPE_CHECKING:
    from salun_core.tasks.diffusion import DiffusionTask


def evaluate(
    task: DiffusionTask, inputs: DiffusionInputs, candidate: Candidate, options: EvaluationOptions
) -> Evidence:
    """Evaluate a diffusion model against the original, with the classifier and the metrics on the model card."""
    require_same_parts(inputs.original, candidate.model)
    named = inputs.card.evaluation.judge
    with ExitStack() as stack:
        judge = stack.enter_context(model_folder(named, options.store_uri)) if named else None
        evaluators = evaluators_of(inputs, judge)  # before the reference, so that missing files fail early
        reference, facts = reference_model(task, inputs, options, candidate.facts)
        return measure(inputs, replace(candidate, facts=facts), evaluators, options.device, reference)


def measure(
    inputs: DiffusionInputs,
    candidate: Candidate,
    evaluators: Evaluators,
    device: torch.device,
    reference: nn.Module | None = None,
) -> Evidence:
    """Generate with both models, and perhaps a reference, from the same seeds and evaluate the images.

    ModelError if the models do not fit each other, or an image is not finite.
    """
    family, own, card = inputs.family(device), family_of(candidate.model, device), inputs.card
    before, after = family.denoiser, own.denoiser
    sampler = family.sampler(card.evaluation)
    plan = plan_of(inputs, evaluators.classifier, sampler)
    table = family.conditions(inputs.rows.names).to(device)
    generator = ImageGenerator(inputs, family, table, sampler, plan)
    changed = replace(generator, family=own, table=own.conditions(inputs.rows.names).to(device))  # its text encoder's
    told = changed.table.rows
    later = RobustnessResult()
    if evaluators.classifier is not None:
        later = measure_robustness(generator, evaluators.classifier, changed, device)
    retrained = before.of(reference.to(device, torch.float32)) if reference else None
    hybrid = None
    if evaluators.classifier is not None and any(not torch.equal(rows, table.rows[key]) for key, rows in told.items()):
        hybrid = generator.sample(after)  # with the text encoder of the original
    elif evaluators.classifier is not None and (named := after.with_class_embedding_of(before)):
        hybrid = generator.sample(named)
    samples = {"before": generator.sample(before), "after": changed.sample(after)}
    encoders = (_text_encoder(inputs.original), _text_encoder(candidate.model)) if card.trainable_text_encoder else None
    seen = Comparison(
        samples | ({"reference": generator.sample(retrained)} if retrained else {}),
        (before.network, after.network),
        plan,
        evaluators,
        candidate.mask,
        hybrid,
        encoders,
        measured=later.metrics,
        resurgence=later.resurgence,
    )
    evidence = evaluate_generated_images(
        seen, inputs.measured(candidate, reference), inputs.forgotten(), candidate.facts
    )
    assert evidence.generation is not None
    return evidence.model_copy(update={"generation": evidence.generation.model_copy(update={"task": card.task})})


def plan_of(inputs: DiffusionInputs, judge: ImageClassifier | None, sampler: Sampler) -> SamplingPlan:
    """Choose the rows to sample: all classes that the model still knows, and all named prompts.

    The judge's classes are matched by name.
    """
    card, settings = inputs.card, inputs.card.evaluation
    gone = forgotten_prompts(card, inputs.forget_set)
    classes = class_names(card)
    known = {*inputs.kept_classes, *inputs.forget_set.classes}
    rows = [name for label, name in enumerate(classes) if label in known]
    rows += [name for name in inputs.rows.names if name not in classes]
    near = {*settings.neighbours, *(text for concept in inputs.forget_set.concepts for text in concept.neighbours)}
    watched, harmless = {*watched_prompts(card)}, {*harmless_prompts(card)}
    # FID compares the kept classes with real images of them. Without data, the harmless prompts stand in.
    compared = harmless if inputs.data is None else {*classes}
    near |= {classes[card.classes.index(name)] for name in settings.neighbours if name in card.classes}
    names = list(judge.classes) if judge else []
    labels = [_judged(label_of(name, card), card.classes, names) for name in rows]
    return SamplingPlan(
        rows=rows,
        forgotten=[index for index, name in enumerate(rows) if name in gone],
        labels=labels,
        neighbours=[index for index, name in enumerate(rows) if name in near and name not in gone],
        watched=[index for index, name in enumerate(rows) if name in watched and name not in gone],
        clip_rows=[index for index, name in enumerate(rows) if name in harmless and name not in gone] or None,
        distance_rows=[index for index, name in enumerate(rows) if name in compared and name not in gone]
        if harmless
        else None,
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


def held_out_images(inputs: DiffusionInputs) -> tuple[Tensor, list[int], int] | None:
    """Return held-out images of the model's size, their classes, and how many are of classes to keep.

    None without data. uint8 [N, C, H, W], first those to keep. Of either part there are at most as many as the model
    card sets.
    """
    data, card = inputs.data, inputs.card
    if data is None:
        return None
    label = {name: data.table.labels[data.table.position[name]] for name in data.split.ids("test")}
    most, kept = card.evaluation.real_images, set(inputs.kept_classes)
    stay, gone = ([name for name in label if (label[name] in kept) == of_kept][:most] for of_kept in (True, False))
    images = fitted(data.pixels([*stay, *gone]), card.channels, card.height, card.width)
    return images, [label[name] for name in (*stay, *gone)], len(stay)


def calibrated(
    card: DiffusionCard, classifier: ImageClassifier, images: Tensor, labels: Sequence[int]
) -> Calibration | None:
    """Calibrate the image classifier on held-out images of the classes that it knows; None with too few of them.

    images: uint8 [N, C, H, W]; labels: the model's classes.
    """
    judged = [_judged(label, card.classes, classifier.classes) for label in labels]
    known = [(place, label) for place, label in enumerate(judged) if label is not None]
    if len(known) < len(labels):
        images = images[[place for place, _ in known]]
    return Calibration.of(classifier, images, torch.tensor([label for _, label in known], dtype=torch.int64))


def evaluators_of(inputs: DiffusionInputs, judge: Path | None) -> Evaluators:
    """Load the image classifier, extractor and detectors on the model card. `judge` is the classifier's folder."""
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
    held_out = held_out_images(inputs) if extractor or judging else None
    return Evaluators(
        classifier=judging,
        extractor=extractor,
        real=held_out[0][: held_out[2]] if extractor and held_out else None,
        clip=ClipScorer.load(Path(settings.clip)) if settings.clip else None,
        detector=NudityDetector.load() if settings.suite == "nsfw" else None,
        calibration=calibrated(inputs.card, judging, *held_out[:2]) if judging and held_out else None,
    )


def require_same_parts(original: LoadedDiffusion, candidate: LoadedDiffusion) -> None:
    """Check that only the denoiser changed, and the text encoder's weights if the original's card allows it.

    The candidate's card must not allow what the original's does not. ModelError otherwise.
    """
    allowed = original.card.trainable_text_encoder
    if candidate.card.trainable_text_encoder != allowed:  # otherwise a child could grant itself what its parent lacks
        raise ModelError(
            "the two model cards differ in trainable_text_encoder",
            f"the original's is {allowed}",
            "compare a model with a version unlearned from it",
        )
    before, after = (_other_files(model) for model in (original, candidate))
    differing = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    trained = {name for name in before.keys() & after.keys() if allowed and _TEXT_WEIGHTS.fullmatch(name)}
    if refused := [name for name in differing if name not in trained]:
        raise ModelError(
            "the two models differ in more than the denoiser",
            ", ".join(refused[:5]),
            "compare a model with a version unlearned from it",
        )


_TEXT_WEIGHTS = re.compile(rf"{TEXT_ENCODER}/[^/]+\.safetensors")


def _text_encoder(model: LoadedDiffusion) -> nn.Module:
    return model.components.parts[TEXT_ENCODER]  # type: ignore[no-any-return]


def _other_files(model: LoadedDiffusion) -> dict[str, str]:
    folder, own = model.components.folder, f"{model.components.denoiser_name}/"
    names = [name for name in model_files(folder) if not name.startswith(own)]
    return {name: sha256_file(folder / name) for name in names}
