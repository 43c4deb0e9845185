"""A classifier that judges generated images: what it calls them, and the features that it sees in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salun_core.data.images import Normalisation
from salun_core.errors import DataError, ModelError
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import LoadedModel

_BATCH = 256
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL turns RGB into grey when the training images are decoded


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier of a model line, fed with images as a generator makes them.

    Args:
        model: the classifier, on the device that it judges on.
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
        """Return the class that each image is called.

        Args:
            images: uint8 [B, C, H, W] of any size, with 1 or 3 channels.

        Returns:
            int64 [B] on the CPU; the lowest id on a tie.

        Raises:
            DataError: the images cannot be turned into what the classifier takes.
            ModelError: its outputs are not numbers.
        """
        with _evaluating(self.model):
            logits = [self.model(inputs) for inputs in self._inputs(images)]
        if not all(torch.isfinite(part).all() for part in logits):
            raise ModelError("the judge's outputs are not numbers", "its weights are damaged", "give another judge")
        return _joined([part.argmax(dim=1).cpu() for part in logits], torch.int64, ())

    def features(self, images: Tensor) -> Tensor:
        """Return what the classifier's last linear layer is given: its penultimate features.

        Args:
            images: uint8 [B, C, H, W] of any size, with 1 or 3 channels.

        Returns:
            float32 [B, F] on the CPU.

        Raises:
            DataError: the images cannot be turned into what the classifier takes.
            ModelError: it has no linear layer, or does not use it.
        """
        head = _head(self.model)
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1).float().cpu()))
        try:
            with _evaluating(self.model):
                for inputs in self._inputs(images):
                    self.model(inputs)
        finally:
            hook.remove()
        if sum(map(len, seen)) != len(images):
            raise ModelError(
                "the judge has no penultimate features", "its last linear layer is not used once", "give another judge"
            )
        return _joined(seen, torch.float32, (head.in_features,))

    def _inputs(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the images in batches, normalised, on the classifier's device."""
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        normalisation = Normalisation(tuple(self.card.mean), tuple(self.card.std))
        for part in torch.split(images, _BATCH):
            yield normalisation.apply(fitted(part.to(device), self.card.channels, self.card.height, self.card.width))


def as_asked(batches: Iterator[Tensor], expected: int, state: str) -> Iterator[Tensor]:
    """Pass on the batches that a model generates while they are what was asked for.

    Args:
        batches: of the sampler.
        expected: number of images that were asked for.
        state: which model it is, for the message: before, after, reference.

    Yields:
        uint8 [B, 3, H, W], all of one size, `expected` in all.

    Raises:
        ModelError: they are not numbers, no such images, or another number.
    """
    count, shape = 0, None
    for images in batches:
        if images.is_floating_point() and not torch.isfinite(images).all():
            raise _other_images(state, "they are not numbers")
        shape = shape or tuple(images.shape[1:])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[1:]) != shape:
            found = f"{images.dtype} of shape {list(images.shape)}"
            raise _other_images(state, f"{found}, not uint8 [B, 3, H, W] of one size")
        count += len(images)
        if count > expected:
            raise _other_images(state, f"at least {count} where {expected} were asked for")
        yield images
    if count != expected:
        raise _other_images(state, f"{count} where {expected} were asked for")


def _other_images(state: str, why: str) -> ModelError:
    return ModelError(f"the model {state} generated other images", why, "check the model and its sampler")


def fitted(images: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Give images the channels and the size that a classifier takes.

    RGB becomes luma for one channel, and grey is repeated for three. Images of another size are resized (bilinear,
    with antialiasing) until they cover the new size, and cropped around the centre, as training images are decoded.

    Args:
        images: uint8 [B, C, H, W].
        channels: 1 or 3, or as many as the images have.
        height: in pixels.
        width: in pixels.

    Returns:
        uint8 [B, channels, height, width]; the images themselves where they fit already.

    Raises:
        DataError: they are no such images, or have other channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            "these are no images", f"{images.dtype} of shape {list(images.shape)}", "give uint8 [B, C, H, W]"
        )
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
        "images do not fit the judge", f"they have {found} channels, it takes {channels}", "give a judge of such images"
    )


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if tuple(images.shape[2:]) == (height, width):
        return images
    scale = max(height / images.shape[2], width / images.shape[3])
    size = max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale))
    smooth = interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return smooth[..., top : top + height, left : left + width].round_().clamp_(0, 255).to(torch.uint8)


def _head(model: nn.Module) -> nn.Linear:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError("the judge has no penultimate features", "it has no linear layer", "give another judge")
    return linear[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode without gradients; the modes of its modules are put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _joined(parts: list[Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, *shape, dtype=dtype)
