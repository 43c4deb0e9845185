"""Builds the examples of a run: conditions, and latents of the images to forget and to keep, computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from salun_core.data import ImageSet, LoadedData
from salun_core.data.targets import ConceptTarget
from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.families import Family
from salun_core.diffusion.sampling import samples
from salun_core.errors import DataError, UsageError
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import ExampleSets
from salun_core.tasks.diffusion.inputs import DiffusionInputs, class_names, forgotten_prompts


def build_example_sets(
    inputs: DiffusionInputs, config: DiffusionConfig, device: torch.device, *, retain: bool = True
) -> ExampleSets:
    """Convert images and prompts to the inputs of a method; VAE and text encoders run only here.

    Scoring needs no examples to keep (`retain=False`); otherwise DataError if there are none.
    """
    family = inputs.family(device)
    encoder = family.text_encoder(inputs.rows.names) if config.selection == "text" else None  # refuses before any work
    table = family.conditions(inputs.rows.names).to(device)
    forget = [_class_examples(inputs, family, label, config) for label in inputs.forget_set.classes]
    kept = _kept_examples(inputs, family, config) if retain else []
    for concept in inputs.forget_set.concepts:
        forget.append(_generated(inputs, family, concept, table))
        kept += [_generated(inputs, family, concept, table, anchor=True)] if retain else []
    if retain and not kept:
        raise DataError("there is nothing to keep", "no class is left", "name fewer classes")
    together = _joined(forget)
    retained = _joined(kept or [together.select([])])
    return ExampleSets(together.to(device), retained.to(device), table, family.pixels, encoder)


def _joined(parts: Sequence[Examples]) -> Examples:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.joined(part)
    return whole


def _class_examples(inputs: DiffusionInputs, family: Family, label: int, config: DiffusionConfig) -> Examples:
    data = inputs.data
    if data is None:
        raise UsageError(
            "a class cannot be forgotten without data", "the model came with none", "name a concept, by its prompts"
        )
    table = data.table
    ids = [name for name in inputs.forget_set.samples if table.labels[table.position[name]] == label]
    examples = _encoded(data, family, ids)
    return examples.with_pseudo(_pseudo(label, len(ids), inputs.kept_classes, config).to(examples.mean.device))


def _pseudo(label: int, count: int, kept: Sequence[int], config: DiffusionConfig) -> Tensor:
    """Choose the replacement condition of each image of a class."""
    if config.pseudo == "anchor":
        raise UsageError("a class has no anchor", "only a concept names one", "set pseudo to next or random")
    if not kept:
        raise UsageError("there is no other class", "a forgotten class must look like one that is kept", "name fewer")
    if config.pseudo == "random":
        drawn = torch.randint(len(kept), (count,), generator=torch.Generator().manual_seed(config.seed))
        return torch.tensor(kept, dtype=torch.int64)[drawn]
    following = min(kept, key=lambda other: (other <= label, other))
    return torch.full((count,), following, dtype=torch.int64)


def _kept_examples(inputs: DiffusionInputs, family: Family, config: DiffusionConfig) -> list[Examples]:
    """Encode retained training images, at most as many as the run can visit or the configuration requests."""
    data = inputs.data
    if data is None:
        return []
    table, gone = data.table, set(inputs.forget_set.samples)
    forgotten = forgotten_prompts(inputs.card, inputs.forget_set)
    lost = {label for label, name in enumerate(class_names(inputs.card)) if name in forgotten}
    kept = [
        name for name in data.split.ids("train") if name not in gone and table.labels[table.position[name]] not in lost
    ]
    count = min(config.steps * config.batch_size, config.retain_limit or len(kept))
    return [_encoded(data, family, kept[:count])] if kept else []


def _encoded(data: LoadedData, family: Family, ids: Sequence[str]) -> Examples:
    labels = torch.tensor([data.table.labels[data.table.position[name]] for name in ids], dtype=torch.int64)
    return family.examples(ImageSet(data.pixels(ids), labels, ids=ids), labels)


def _generated(
    inputs: DiffusionInputs, family: Family, concept: ConceptTarget, table: ConditionTable, anchor: bool = False
) -> Examples:
    """Generate a concept or its anchor with the original model; the sampler's output is already a latent.

    The seeds derive from the concept, so that every step of a run makes the same images.
    """
    rows, sampler = inputs.rows, family.sampler(inputs.card.evaluation)
    instead = rows.of(concept.anchor_prompt)
    shown = [rows.of(concept.prompts[index % len(concept.prompts)]) for index in range(concept.images)]
    wanted = [instead] * concept.images if anchor else shown
    first = int(concept.pseudo_id.rpartition("/")[2][:7], 16)
    seeds = [first + index for index in range(concept.images)]
    made = torch.cat(list(samples(family.denoiser, table, sampler, wanted, seeds)))
    condition = torch.tensor(wanted, dtype=torch.int64, device=made.device)
    return Examples(made, condition, pseudo=None if anchor else torch.full_like(condition, instead))
