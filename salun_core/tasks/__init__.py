"""Opens a model folder by the task on its card: a classifier or a diffusion model. Every step asks here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun_core.data.split import SplitManifest
from salun_core.methods.classification import method_config
from salun_core.methods.config import LoopConfig
from salun_core.models import LoadedModel, load_model
from salun_core.models.card import DiffusionCard, read_card
from salun_core.models.checkpoint import CARD, SPLIT, WEIGHTS
from salun_core.registry.manifest import PIPELINE_INDEX
from salun_core.storage.local_files import list_tree
from salun_core.tasks.classification.inputs import Inputs, load_inputs

if TYPE_CHECKING:
    from salun_core.models.diffusers_folder import LoadedDiffusion
    from salun_core.tasks.diffusion.inputs import DiffusionInputs


def is_generative(folder: Path) -> bool:
    """Say whether a model folder holds a diffusion model.

    Raises:
        UsageError: it is no model folder, or its card has faults.
    """
    return isinstance(read_card(folder), DiffusionCard)


def open_model(folder: Path) -> LoadedModel | LoadedDiffusion:
    """Read a model folder of either kind, and check all of it."""
    if not is_generative(folder):
        return load_model(folder)
    from salun_core.models.diffusers_folder import load_diffusion

    return load_diffusion(folder)


def open_inputs(model: Path, forget: str, data: str | None = None) -> Inputs | DiffusionInputs:
    """Load and check what a step works on, of either kind; see `load_inputs` and `load_generation_inputs`."""
    if not is_generative(model):
        return load_inputs(model, forget, data)
    from salun_core.tasks.diffusion.inputs import load_generation_inputs

    return load_generation_inputs(model, forget, data)


def resolved_config(model: Path, method: str, overrides: Mapping[str, Any]) -> LoopConfig:
    """Resolve a method's configuration for the kind of model that a folder holds.

    Raises:
        UsageError: an unknown method or key, or a value out of range (all faults are listed).
    """
    if not is_generative(model):
        return method_config(method, overrides)
    from salun_core.methods.diffusion import diffusion_config

    return diffusion_config(method, overrides)


def sizes_of(inputs: Inputs | DiffusionInputs) -> dict[str, int]:
    """Return how much there is to forget and to keep: samples, and images that concepts generate."""
    generated = sum(concept.images for concept in inputs.forget_set.concepts)
    kept = len(inputs.original.split.train) - len(inputs.forget_set.samples)
    return {"forget_samples": len(inputs.forget_set.samples) + generated, "retain_samples": kept + generated}


def kept_split(inputs: Inputs | DiffusionInputs) -> SplitManifest:
    """Return the split of the model after: without the samples that are forgotten."""
    return inputs.original.split.without(inputs.forget_set.samples)


def version_files(folder: Path) -> dict[str, Path]:
    """Return the files of a model folder that make up a version, by name: weights, card, split; no run's facts."""
    if not is_generative(folder):
        return {name: folder / name for name in (WEIGHTS, CARD, SPLIT)}
    own = {CARD, SPLIT, PIPELINE_INDEX}
    return {name: folder / name for name in sorted(list_tree(folder).files) if "/" in name or name in own}
