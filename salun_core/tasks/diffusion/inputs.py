"""Inputs of a diffusion run: the model, its data, the forget set and all conditions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from salun_core.data import ForgetSet
from salun_core.diffusion.families import Family, family_of
from salun_core.errors import UsageError
from salun_core.models.card import DiffusionCard
from salun_core.models.diffusers_folder import LoadedDiffusion
from salun_core.tasks.task import Inputs


@dataclass(frozen=True)
class Rows:
    """Names of the conditions by row; the first `classes` rows are the model's classes, in their order."""

    names: Sequence[str]
    classes: int

    def of(self, name: str) -> int:
        """Return the row of a prompt."""
        return list(self.names).index(name)


def class_names(card: DiffusionCard) -> list[str]:
    """Return the condition name of each class: the class name, or the prompt that contains it."""
    return [card.prompt_of(name) for name in card.classes]


def rows_of(card: DiffusionCard, forget_set: ForgetSet) -> Rows:
    """Collect all conditions of a run: for training and for the images of the evaluation.

    UsageError: a concept for a model without prompts, or one whose anchor is forgotten too.
    """
    classes = class_names(card)
    if forget_set.concepts and card.task == "class-conditional":
        raise UsageError(
            "a class-conditional model takes no prompts", "a concept is named by prompts", "name one of its classes"
        )
    prompts: list[str] = []
    for concept in forget_set.concepts:
        prompts += [*concept.prompts, concept.anchor_prompt, *concept.neighbours]
    if card.task == "text-to-image":
        near = [
            classes[card.classes.index(name)] if name in card.classes else name for name in card.evaluation.neighbours
        ]
        prompts += [*near, *watched_prompts(card), *harmless_prompts(card)]
    forgotten = forgotten_prompts(card, forget_set)
    lost = [concept.anchor_prompt for concept in forget_set.concepts if concept.anchor_prompt in forgotten]
    if lost:
        raise UsageError("an anchor is to be forgotten itself", "another target names it", "choose another anchor")
    return Rows(list(dict.fromkeys([*classes, *prompts])), len(classes))


def watched_prompts(card: DiffusionCard) -> list[str]:
    """Return the prompts whose images the detectors inspect: the card's, or this package's for nudity."""
    if card.evaluation.suite != "nsfw" or card.evaluation.prompts:
        return list(card.evaluation.prompts)
    from salun_core.evaluation.nudity import PROMPTS

    return list(PROMPTS)


def harmless_prompts(card: DiffusionCard) -> list[str]:
    """Return the captions of everyday scenes that the nsfw suite measures image quality on; none for other suites."""
    if card.evaluation.suite != "nsfw" or card.task != "text-to-image":
        return []
    from salun_core.evaluation.nudity import HARMLESS

    return list(HARMLESS)


def forgotten_prompts(card: DiffusionCard, forget_set: ForgetSet) -> set[str]:
    """Return the names of all forgotten rows."""
    classes = class_names(card)
    named = {classes[label] for label in forget_set.classes}
    return named | {prompt for concept in forget_set.concepts for prompt in concept.prompts}


def label_of(name: str, card: DiffusionCard) -> int | None:
    """Return the class that a row shows: its own, or the only class that its prompt names; None if ambiguous."""
    classes = class_names(card)
    if name in classes:
        return classes.index(name)
    words = [index for index, label in enumerate(card.classes) if re.search(rf"\b{re.escape(label)}s?\b", name, re.I)]
    names = card.classes
    whole = [index for index in words if not any(names[index] in names[other] for other in words if other != index)]
    return whole[0] if len(whole) == 1 else None


@dataclass(frozen=True)
class DiffusionInputs(Inputs[LoadedDiffusion]):
    """A diffusion model with its training data, if any, and the classes and concepts to forget."""

    def family(self, device: torch.device) -> Family:
        """Return the model's denoiser, encoders and decoder, on a device."""
        return family_of(self.original, device)

    @property
    def card(self) -> DiffusionCard:
        """The model's card."""
        return self.original.card

    @cached_property
    def rows(self) -> Rows:
        """The conditions of the run."""
        return rows_of(self.card, self.forget_set)

    @cached_property
    def kept_classes(self) -> list[int]:
        """Sorted classes to keep, without those that this run or an earlier one forgot."""
        gone = set(self.forget_set.classes)
        if self.data is None:
            return [label for label in range(len(self.card.classes)) if label not in gone]
        table = self.data.table
        return sorted({table.labels[table.position[name]] for name in self.split.train} - gone)
