"""Inputs of a classifier's run: the model, its data and the images to forget and to retain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from salun_core.data import ImageSource, LoadedData
from salun_core.evaluation.evidence import Forgotten, KindCount
from salun_core.models import LoadedModel
from salun_core.tasks.task import Inputs


@dataclass(frozen=True)
class ClassifierInputs(Inputs[LoadedModel]):
    """A classifier with the data that it was trained on and the set to forget."""

    data: LoadedData

    @cached_property
    def forget(self) -> ImageSource:
        """D_f with true labels; ModelError if image size or classes differ from the model's."""
        return self._checked(self.data.forget(self.forget_set, self.original.normalisation))

    @cached_property
    def retain(self) -> ImageSource:
        """D_r with true labels; errors as for `forget`."""
        return self._checked(self.data.retain(self.forget_set, self.original.normalisation))

    def _checked(self, images: ImageSource) -> ImageSource:
        self.original.check_images(images.shape, len(self.data.table.classes))
        return images

    @cached_property
    def held_out(self) -> ImageSource | None:
        """The validation split, which the model was not trained on; None if there is none."""
        return self.data.images("validation", self.original.normalisation) if self.split.validation else None

    @cached_property
    def test(self) -> ImageSource:
        """The test split without the classes that earlier runs forgot, because the model should not recognise them."""
        images = self.data.images("test", self.original.normalisation)
        table = self.data.table
        known = set(np.unique(table.labels_at(table.rows_of(list(self.split.train)))).tolist())
        return images.select([index for index, label in enumerate(images.labels.tolist()) if label in known])

    @cached_property
    def emptied(self) -> tuple[int, ...]:
        """Classes in D_f of which nothing is retained, sorted: a class request's, or the class of a person."""
        table, samples = self.data.table, list(self.split.train.find(self.forget_set.samples))
        count = len(table.classes)
        trained = np.bincount(table.labels_at(table.rows_of(list(self.split.train))), minlength=count)
        gone = np.bincount(table.labels_at(table.rows_of(samples)), minlength=count)
        return tuple(np.flatnonzero((gone > 0) & (gone == trained)).tolist())

    def forgotten(self) -> Forgotten:
        """Describe the forget set; its classes are those of which nothing is retained, whatever named them."""
        table, gone = self.data.table, set(self.emptied)
        labels = table.labels_at(table.rows_of(self.forget_set.ids)).tolist()
        emptied = [label in gone for label in labels]
        by_kind = {
            kind: KindCount(count=len(places), in_classes=sum(emptied[place] for place in places))
            for kind, places in self.forget_set.of_kind.items()
        }
        found = {"classes": list(self.emptied), "in_classes": sum(emptied), "by_kind": by_kind}
        return super().forgotten().model_copy(update=found)
