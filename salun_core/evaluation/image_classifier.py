"""The classifier that evaluates generated images: the class of each image, its features, and what is no class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from salun_core.data.images import Normalisation, fitted
from salun_core.device_memory import fitting
from salun_core.errors import ModelError
from salun_core.evaluation.evidence import Share
from salun_core.evaluation.outputs import evaluation_mode, penultimate_features
from salun_core.evaluation.statistics import share_of
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import LoadedModel

_BATCH = 256
_TAIL = 0.05  # of the real images, beyond the bound

FEWEST_REAL = 40
"""Fewest real images of a calibration: with fewer, a bound that 5 % of them lie beyond is not defined."""


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
        return self._logits(images).argmax(dim=1)

    def confidences(self, images: Tensor) -> Tensor:
        """Return the largest probability of each image, float64 [B] on the CPU; see `predict`."""
        return torch.softmax(self._logits(images).double(), dim=1).amax(dim=1)

    def _logits(self, images: Tensor) -> Tensor:
        with evaluation_mode(self.model):
            logits, _ = fitting(lambda size: [self.model(inputs) for inputs in self._inputs(images, size)], _BATCH)
        if not all(torch.isfinite(part).all() for part in logits):
            raise ModelError(
                "the image classifier's outputs are not numbers", "its weights are damaged", "use another classifier"
            )
        return torch.cat([torch.empty(0, len(self.classes)), *(part.float().cpu() for part in logits)])

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


@dataclass(frozen=True)
class Calibration:
    """A bound beyond which an image shows none of the classes, from real held-out images.

    A classifier puts any image in one of its classes, noise too. An image shows none of them if its penultimate
    features are further from the nearest real image's than those of 95 % of the real images are from one another's. Of
    a classifier without a linear layer, the largest probability must be lower than for 95 % of them. The distance is
    preferred: a small model that draws another class instead is unsure of it, but stays near.

    Args:
        classifier: the classifier.
        real: its accuracy on the real images.
        rejected: share of the real images that lie beyond the bound, about 5 %.
        features: of the real images, [M, F]; None for a classifier without a linear layer.
        bound: largest distance, or lowest probability.

    Source:
        Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, here without normalised
        features: their length tells plain grey images from real ones. Hendrycks & Gimpel, "A Baseline for Detecting
        Misclassified and Out-of-Distribution Examples", ICLR 2017.
    """

    classifier: ImageClassifier
    real: Share
    rejected: Share
    features: Tensor | None
    bound: float

    @classmethod
    def of(cls, classifier: ImageClassifier, images: Tensor, labels: Tensor) -> Calibration | None:
        """Calibrate a classifier.

        Args:
            classifier: the classifier.
            images: real images that it was not trained on, uint8 [M, C, H, W].
            labels: their classes, int64 [M].

        Returns:
            The calibration, or None for fewer than 40 images.
        """
        accuracy = share_of((classifier.predict(images) == labels).numpy())
        if accuracy is None or len(images) < FEWEST_REAL:
            return None
        try:
            features: Tensor | None = classifier.features(images)
        except ModelError:  # it has no linear layer
            features = None
        if features is None:
            values = classifier.confidences(images)
            bound = float(torch.quantile(values, _TAIL))
            rejected = share_of((values < bound).numpy())
        else:
            values = torch.cdist(features, features).fill_diagonal_(float("inf")).amin(dim=1).double()
            bound = float(torch.quantile(values, 1 - _TAIL))
            rejected = share_of((values > bound).numpy())
        assert rejected is not None
        return cls(classifier, accuracy, rejected, features, bound)

    @property
    def distance(self) -> float | None:
        """The bound, if it is a distance."""
        return None if self.features is None else self.bound

    @property
    def probability(self) -> float | None:
        """The bound, if it is a probability."""
        return self.bound if self.features is None else None

    def shows_none(self, images: Tensor) -> Tensor:
        """Return whether each image shows none of the classes, bool [B] on the CPU.

        Args:
            images: uint8 [B, C, H, W], at least one.
        """
        if self.features is None:
            return self.classifier.confidences(images) < self.bound
        apart = torch.cdist(self.classifier.features(images), self.features).amin(dim=1)
        return apart.double() > self.bound
