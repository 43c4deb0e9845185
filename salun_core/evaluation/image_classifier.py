"""The classifier that evaluates generated images: the class of each image, and its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salun_core.data.images import Normalisation
from salun_core.errors import DataError, ModelError
from salun_core.evaluation.outputs import evaluation_mode, penultimate_features
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import LoadedModel

_BATCH = 256
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL turns RGB into grey when the training images are decoded


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
            logits = [self.model(inputs) for inputs in self._inputs(images)]
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
        found = penultimate_features(self.model, self._inputs(images))
        if found is None or len(found) != len(images):
            why = "it has no linear layer" if found is None else "its last linear layer is not used once per image"
            raise ModelError("the image classifier has no penultimate features", why, "use another classifier")
        return found.float()

    def _inputs(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the images in batches, normalised, on the classifier's device."""
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        normalisation = Normalisation(tuple(self.card.mean), tuple(self.card.std))
        for part in torch.split(images, _BATCH):
            yield normalisation.apply(fitted(part.to(device), self.card.channels, self.card.height, self.card.width))


def fitted(images: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Convert images to the channels and the size of a classifier's input.

    RGB becomes luma for one channel, and grey is repeated for three. Images of another size are resized (bilinear,
    with antialiasing) until they cover the new size, and cropped around the centre, as training images are decoded.

    Args:
        images: uint8 [B, C, H, W].
        channels: 1 or 3, or as many as the images have.
        height: in pixels.
        width: in pixels.

    Returns:
        uint8 [B, channels, height, width]; the same tensor if the images fit already.

    Raises:
        DataError: the tensor does not hold images, or they have other channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise DataError("not a batch of images", found, "give uint8 [B, C, H, W]")
    return _resized(_with_channels(images, channels), height, width)


def _with_channels(images: Tensor, channels: int) -> Tensor:
    found = images.shape[1]
    if found == channels:
        return images
    if found == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    if found == 3 and channels == 1:
        weights = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
        return (images.float() * weights).sum(dim=1, keepdim=True).round_().to(torch.uint8)
    raise DataError(
        "the images do not fit the image classifier",
        f"they have {found} channels, it takes {channels}",
        "use a classifier of such images",
    )


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if tuple(images.shape[2:]) == (height, width):
        return images
    scale = max(height / images.shape[2], width / images.shape[3])
    size = max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale))
    smooth = interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return smooth[..., top : top + height, left : left + width].round_().clamp_(0, 255).to(torch.uint8)
