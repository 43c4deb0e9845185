"""What the steps of a diffusion line work on: the model, its data, and what is to be forgotten, all checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from salun_core.data import ForgetSet, LoadedData, load_data, resolve_forget
from salun_core.data.forget import require_partial
from salun_core.data.split import SplitManifest
from salun_core.diffusion.families import Family, family_of
from salun_core.digest import check_digest
from salun_core.models.diffusers_folder import LoadedDiffusion, load_diffusion
from salun_core.models.generation_card import GenerationCard
from salun_core.steps.generation.rows import Rows, rows_of
from salun_core.steps.inputs import moved_spec
from salun_core.steps.sources import read_forget


@dataclass(frozen=True)
class GenerationInputs:
    """A diffusion model with the data that it was trained on, if it came with any, and the set to forget.

    Args:
        original: the model before unlearning.
        data: rows, checked against the model's split manifest; None for a model without data.
        forget_set: classes and concepts.
    """

    original: LoadedDiffusion
    data: LoadedData | None
    forget_set: ForgetSet

    def family(self, device: torch.device) -> Family:
        """Return the model's denoiser, encoders and decoder, on a device."""
        return family_of(self.original, device)

    @property
    def card(self) -> GenerationCard:
        """The model's card."""
        return self.original.card

    @property
    def split(self) -> SplitManifest:
        """The split that the model was trained on; empty for a model without data."""
        return self.original.split

    @cached_property
    def rows(self) -> Rows:
        """The conditions of the run."""
        return rows_of(self.card, self.forget_set)

    @cached_property
    def kept_classes(self) -> list[int]:
        """Classes that the model knows and is to keep, sorted: none that this run or an earlier one forgot."""
        gone = set(self.forget_set.classes)
        if self.data is None:
            return [label for label in range(len(self.card.classes)) if label not in gone]
        table = self.data.table
        return sorted({table.labels[table.position[name]] for name in self.split.train} - gone)


def load_generation_inputs(model: Path, forget: str, data: str | None = None) -> GenerationInputs:
    """Load and check what a step works on.

    Args:
        model: folder of the original model.
        forget: address of the forget targets or of a resolved forget set.
        data: data set spec, where the data lie elsewhere than the model card says.

    Raises:
        UsageError: something does not exist or has faults, or the model cannot forget it.
        DataError: the forget set is empty or is all of the data.
        IntegrityError: the data or the forget set are of another split.
    """
    original = load_diffusion(model)
    card, split = original.card, original.split
    loaded = load_data(moved_spec(card.data, data), split) if card.data is not None else None
    named = read_forget(forget)
    if isinstance(named, ForgetSet):
        check_digest("the split of the forget set", split.digest, named.split_digest)
        forget_set = named
    else:
        forget_set = resolve_forget(named, loaded.table if loaded else None, split, generative=True)
    require_partial(forget_set, split)
    return GenerationInputs(original, loaded, forget_set)
