"""The classifier that evaluates generated images: the class of each image, its features, and what is no class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_NOISE = 0.9  # of each kind of noise a feature space has to tell from real images
_EACH = 64  # images of a kind of noise

FEWEST_REAL = 40
"""Fewest real images of a calibration: with fewer, a bound that 5 % of them lie beyond is not defined."""


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier of a model line, applied to images as a sampler yields them.

    Args:
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
        """Return the predicted class of each image, int64 [B] on the CPU; the lowest id on a tie.

        Images are uint8 [B, C, H, W] of any size, with 1 or 3 channels.
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
        """Return the inputs of the classifier's last linear layer, float32 [B, F] on the CPU.

        Images are uint8 [B, C, H, W] of any size, with 1 or 3 channels. A classifier without such a layer is a
        `ModelError`.
        """
        found = penultimate_features(self.model, partial(self._inputs, images), _BATCH)
        if found is None or len(found) != len(images):
            why = "it has no linear layer" if found is None else "its last linear layer is not used once per image"
            raise ModelError("the image classifier has no penultimate features", why, "use another classifier")
        return found.float()

    def responses(self, images: Tensor) -> Tensor | None:
        """Return mean and standard deviation of each channel after each stage, float32 [B, S] on the CPU.

        Images are uint8 [B, C, H, W] of any size. None for a network whose stages have no spatial extent.

        Source:
            Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
            NeurIPS 2018, section 2.2: features of all stages tell other inputs apart, the last one's often do not.
        """
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() in (3, 4):
                values = output.flatten(2) if output.dim() == 4 else output.transpose(1, 2)  # tokens: [B, T, C]
                found.append(torch.cat([values.mean(2), values.std(2, correction=0)], 1).float().cpu())

        def rows(size: int) -> Tensor | None:
            parts = []
            for inputs in self._inputs(images, size):
                found.clear()
                self.model(inputs)
                parts += [torch.cat(found, 1)] if found else []
            return torch.cat(parts) if parts else None

        stages = [stage for stage in self.model.children() if next(stage.parameters(), None) is not None]
        hooks = [stage.register_forward_hook(keep) for stage in stages]
        try:
            with evaluation_mode(self.model):
                return fitting(rows, _BATCH)[0]
        finally:
            for hook in hooks:
                hook.remove()

    def _inputs(self, images: Tensor, size: int) -> Iterator[Tensor]:
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        normalisation = Normalisation(tuple(self.card.mean), tuple(self.card.std))
        for part in torch.split(images, size):
            yield normalisation.apply(fitted(part.to(device), self.card.channels, self.card.height, self.card.width))


class _Space:
    """Distances to the nearest real image in one feature space, each feature in units of its deviation there or not."""

    def __init__(self, features: Callable[[Tensor], Tensor | None], real: Tensor, *, scaled: bool) -> None:
        self._features = features
        self._shift = real.mean(0) if scaled else torch.zeros(())
        self._scale = real.std(0).clamp_min(1e-6) if scaled else torch.ones(())
        self._real = (real - self._shift) / self._scale
        apart = torch.cdist(self._real, self._real).fill_diagonal_(float("inf")).amin(dim=1).double()
        self.bound = float(torch.quantile(apart, 1 - _TAIL))
        self.rejected = apart > self.bound

    def beyond(self, images: Tensor) -> Tensor:
        found = self._features(images)
        assert found is not None
        return torch.cdist((found - self._shift) / self._scale, self._real).amin(dim=1).double() > self.bound

    def noise_rejected(self, noise: list[Tensor]) -> float:
        """The share of noise beyond the bound, of the kind with the smallest."""
        return min(float(self.beyond(images).float().mean()) for images in noise)


def _noise_like(images: Tensor) -> list[Tensor]:
    """Images that show nothing, of the real ones' form: uniform noise, normal noise of their brightness, plain grey."""
    generator = torch.Generator().manual_seed(0)
    shape = (_EACH, *images.shape[1:])
    real = images.float()
    normal = torch.randn(shape, generator=generator) * real.std() + real.mean()
    uniform = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return [uniform, normal.clamp(0, 255).to(torch.uint8), torch.full((1, *shape[1:]), 127, dtype=torch.uint8)]


@dataclass(frozen=True)
class Calibration:
    """A bound beyond which an image shows none of the classes, from real held-out images.

    A classifier puts any image in one of its classes, noise too. An image shows none of them if its features are
    further from the nearest real image's than those of 95 % of the real images are from one another's. The penultimate
    features are preferred: a small model that draws another class instead is unsure of it, but stays near. One
    training in four gives features among which much noise lies near real images. If less than nine tenths of any kind
    of noise is beyond the bound, the responses of all stages decide, if these tell noise better. Of a classifier that
    has neither, the largest probability must be lower than for 95 % of the real images.

    Args:
        rejected: share of the real images that lie beyond the bound, about 5 %.
        noise: share of noise that lies beyond the bound, of the kind of noise with the smallest; None if the
            probability decides.
        space: the distances; None if the probability decides.
        bound: largest distance, or lowest probability.

    Source:
        Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, here without normalised
        features: their length tells plain grey images from real ones. Hendrycks & Gimpel, "A Baseline for Detecting
        Misclassified and Out-of-Distribution Examples", ICLR 2017.
    """

    classifier: ImageClassifier
    real: Share
    rejected: Share
    noise: float | None
    space: _Space | None
    bound: float

    @classmethod
    def of(cls, classifier: ImageClassifier, images: Tensor, labels: Tensor) -> Calibration | None:
        """Calibrate with real images that the classifier was not trained on, uint8 [M, C, H, W].

        Fewer than 40 images give None.
        """
        accuracy = share_of((classifier.predict(images) == labels).numpy())
        if accuracy is None or len(images) < FEWEST_REAL:
            return None
        noise, best, told = _noise_like(images), None, -1.0
        for features, scaled in ((classifier.features, False), (classifier.responses, True)):
            try:
                real = features(images)
            except ModelError:  # it has no linear layer
                real = None
            if real is None or told >= _NOISE:
                continue
            space = _Space(features, real, scaled=scaled)
            if (share := space.noise_rejected(noise)) > told:
                best, told = space, share
        if best is None:
            values = classifier.confidences(images)
            bound = float(torch.quantile(values, _TAIL))
            rejected = share_of((values < bound).numpy())
        else:
            bound, rejected = best.bound, share_of(best.rejected.numpy())
        assert rejected is not None
        return cls(classifier, accuracy, rejected, None if best is None else told, best, bound)

    @property
    def distance(self) -> float | None:
        """The bound, if it is a distance."""
        return None if self.space is None else self.bound

    @property
    def probability(self) -> float | None:
        """The bound, if it is a probability."""
        return self.bound if self.space is None else None

    def shows_none(self, images: Tensor) -> Tensor:
        """Return whether each image, uint8 [B, C, H, W], shows none of the classes: bool [B] on the CPU."""
        if self.space is None:
            return self.classifier.confidences(images) < self.bound
        return self.space.beyond(images)
