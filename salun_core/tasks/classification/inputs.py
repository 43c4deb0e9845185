"""What every step after the first needs: the original model, its data, and the forget set, all checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from salun_core.data import DataSpec, ForgetSet, ImageSet, LoadedData, load_data, load_spec, resolve_forget
from salun_core.data.forget_set import require_partial
from salun_core.digest import check_digest
from salun_core.models import LoadedModel, load_model
from salun_core.tasks.resolve import read_forget


@dataclass(frozen=True)
class Inputs:
    """A model with the data it was trained on and the set to forget.

    Args:
        original: the model before unlearning.
        data: rows, checked against the model's split manifest.
        forget_set: resolved against the same split.
    """

    original: LoadedModel
    data: LoadedData
    forget_set: ForgetSet

    @cached_property
    def parts(self) -> tuple[ImageSet, ImageSet]:
        """D_f and D_r, decoded once.

        Raises:
            ModelError: the images are not of the model's size, or the classes differ.
        """
        train = self.data.images("train", self.original.normalisation)
        self.original.check_images(train.images, len(self.data.table.classes))
        return self.data.forget_and_retain(train, self.forget_set)

    @property
    def forget(self) -> ImageSet:
        """D_f with true labels."""
        return self.parts[0]

    @property
    def retain(self) -> ImageSet:
        """D_r with true labels."""
        return self.parts[1]


def load_inputs(model: Path, forget: str, data: str | None = None) -> Inputs:
    """Load and check what a step works on.

    Args:
        model: folder of the original model.
        forget: address of the forget targets or of a resolved forget set.
        data: data set spec, where the data lie elsewhere than the model card says.

    Returns:
        The inputs; images are decoded when they are first asked for.

    Raises:
        UsageError: something does not exist or has faults.
        DataError: the forget set is empty or is all of the data.
        IntegrityError: the data or the forget set are of another split.
    """
    original = load_model(model)
    loaded = load_data(moved_spec(original.card.data, data), original.split)
    named = read_forget(forget)
    if isinstance(named, ForgetSet):
        check_digest("the split of the forget set", original.split.digest, named.split_digest)
        forget_set = named
    else:
        forget_set = resolve_forget(named, loaded.table, original.split)
    require_partial(forget_set, original.split)
    return Inputs(original, loaded, forget_set)


def moved_spec(spec: DataSpec, data: str | None) -> DataSpec:
    """Return a model's own data spec; where the data were moved, only the places come from the new one.

    Args:
        spec: of the model card.
        data: a spec as the command line takes it; None where the data lie where they were.
    """
    if data is None:
        return spec
    moved = load_spec(data)
    places = ("source", "test_source", "metadata", "root", "subject_column")
    changes = {name: getattr(moved, name) for name in places if getattr(moved, name) is not None}
    return spec.model_copy(update=changes)
