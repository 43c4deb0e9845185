"""The classifier that evaluates generated images: the class of each image, and its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from salun_core.data.images import Normalisation, fitted
from salun_core.device_memory import fitting
from salun_core.errors import ModelError
from salun_core.evaluation.outputs import evaluation_mode, penultimate_features
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import LoadedModel

_BATCH = 256


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier of a model line, applied to images as a sampler yields them.

    Args:
        model: the classifier, on the device that it runs on.
        card: channels, size and normalisation that it was trained with.
        digest: SHA-256 of its weights.
    """

    model: nn.Module
    card: ModelCard
    digest: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> ImageClassifier:
        """Take the classifier of a model folder."""
        return cls(loaded.model, loaded.card, loaded.digest)

    @property
    def classes(self) -> list[str]:
        """Class names by id."""
        return self.card.classes

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted class of each image.

        Args:
            images: uint8 [B, C, H, W] of any size, with 1 or 3 channels.

        Returns:
            int64 [B] on the CPU; the lowest id on a tie.

        Raises:
            DataError: the images cannot be converted to the classifier's input.
            ModelError: its outputs are not finite.
        """
        with evaluation_mode(self.model):
            logits, _ = fitting(lambda size: [self.model(inputs) for inputs in self._inputs(images, size)], _BATCH)
        if not all(torch.isfinite(part).all() for part in logits):
            raise ModelError(
                "the image classifier's outputs are not numbers", "its weights are damaged", "use another classifier"
            )
        return torch.cat([torch.empty(0, dtype=torch.int64), *(part.argmax(dim=1).cpu() for part in logits)])

    def features(self, images: Tensor) -> Tensor:
        """Return the classifier's penultimate features: the inputs of its last linear layer.

        Args:
            images: uint8 [B, C, H, W] of any size, with 1 or 3 channels.

        Returns:
            float32 [B, F] on the CPU.

        Raises:
            DataError: the images cannot be converted to the classifier's input.
            ModelError: it has no linear layer, or does not use it once per image.
        """
        found = penultimate_features(self.model, partial(self._inputs, images), _BATCH)
        if found is None or len(found) != len(images):
            why = "it has no linear layer" if found is None else "its last linear layer is not used once per image"
            raise ModelError("the image classifier has no penultimate features", why, "use another classifier")
        return found.float()

    def _inputs(self, images: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the images in batches of a size, normalised, on the classifier's device."""
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        normalisation = Normalisation(tuple(self.card.mean), tuple(self.card.std))
        for part in torch.split(images, size):
            yield normalisation.apply(fitted(part.to(device), self.card.channels, self.card.height, self.card.width))
