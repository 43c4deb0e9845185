"""Decoded images: stored as uint8 on the device, normalised and augmented there in batches.

uint8 takes a quarter of the memory of float32, so a whole data set fits on a GPU and batches need no transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from salun_core.errors import DataError, UsageError

_READ = 256  # samples that are collated together; it has no influence on the result
_PADDING = 4  # padding of RandomCrop in the paper's recipe
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL converts RGB to grey when it decodes training images


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Normalisation:
        """Compute the normalisation of uint8 images [N, C, H, W]; a constant channel gets a deviation of 1."""
        pixels = images.to(torch.float64).div_(255)
        mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
        std[std < 1e-6] = 1.0
        return cls(tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in std.tolist()))

    def apply(self, images: Tensor) -> Tensor:
        """Turn uint8 images [N, C, H, W] into normalised float32 in channels-last layout."""
        scale = 1.0 / (255.0 * torch.tensor(self.std, device=images.device))
        shift = -torch.tensor(self.mean, device=images.device) / torch.tensor(self.std, device=images.device)
        values = images.to(torch.float32, memory_format=torch.channels_last)
        count, channels, height, width = values.shape
        rows = values.permute(0, 2, 3, 1).view(count, height, width * channels)
        scale, shift = (one.expand(channels).repeat(width) for one in (scale, shift))
        rows.mul_(scale).add_(shift)  # by whole rows, because 3 channels do not fill a SIMD register
        return values


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Args:
        images: uint8 [N, C, H, W], or float32 that is already normalised.
        labels: int64 [N].
        normalisation: applied to uint8 images in batches.
        augment: `none`, `crop` (pad by 4, random crop) or `crop-flip`.
        ids: sample ids, if known.
    """

    images: Tensor
    labels: Tensor
    normalisation: Normalisation | None = None
    augment: str = "none"
    ids: Sequence[str] = ()

    @classmethod
    def of(cls, data: Images, name: str = "image") -> ImageSet:
        """Accept an image set, a pair (images, labels), a torch data set, or a data loader.

        A data set is read once, in its order, and kept in memory. So is the data set of a loader, with the loader's
        `collate_fn` and workers: its `shuffle`, `batch_size` and `drop_last` have no effect. A loader of an
        `IterableDataset` is read as it comes. Random transforms of the data set are drawn once, in this call.

        Args:
            data: the images; tensors are images [N, ...] and class ids [N].
            name: what the set is called in messages.

        Raises:
            DataError: the data are not images with class ids, or their numbers differ.
            UsageError: the loader has a sampler that may repeat samples or leave some out.
        """
        if isinstance(data, ImageSet):
            return data
        if isinstance(data, tuple):
            return cls(*_pair(data, name))
        batches = [_pair(batch, name) for batch in _collated(data, name)]
        if not batches:
            return cls(torch.empty(0), torch.empty(0, dtype=torch.int64))
        shapes = {tuple(images.shape[1:]) for images, _ in batches}
        if len(shapes) > 1:
            raise _differing(name, f"shapes such as {' and '.join(map(str, sorted(shapes)[:2]))}")
        return cls(torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]))

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set with its tensors on a device."""
        return self._with(self.images.to(device), self.labels.to(device), self.ids)

    def select(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """Return the rows at these indices."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        ids = [self.ids[position] for position in index.tolist()] if self.ids else ()
        return self._with(self.images[index], self.labels[index], ids)

    def relabelled(self, labels: Tensor) -> ImageSet:
        """Return the same images with other labels, int64 [N]."""
        return self._with(self.images, labels, self.ids)

    def joined(self, other: ImageSet) -> ImageSet:
        """Return this set followed by another.

        Raises:
            DataError: the sets differ in type, size or normalisation.
        """
        kinds = {(item.images.dtype, item.images.shape[1:], item.normalisation) for item in (self, other)}
        if len(kinds) > 1:
            raise DataError(
                "two image sets cannot be joined",
                "they differ in type, size or normalisation",
                "load both in the same way",
            )
        ids = [*self.ids, *other.ids] if self.ids and other.ids else ()
        return self._with(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]), ids)

    def batches(
        self, size: int, generator: torch.Generator | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (normalised float32 images [B, C, H, W], labels [B]).

        Args:
            size: batch size B; the last batch may be smaller.
            generator: a CPU generator that shuffles the order and draws the augmentation; None keeps the order.
            augment: whether to augment; needs the generator.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in torch.split(order.to(self.labels.device), size):
            images = _taken(self.images, index)
            if augment and generator is not None and self.augment != "none":
                images = random_crop(images, generator)
                images = random_flip(images, generator) if self.augment == "crop-flip" else images
            yield self._normalised(images), self.labels[index]

    def _normalised(self, images: Tensor) -> Tensor:
        if self.normalisation is not None and images.dtype == torch.uint8:
            return self.normalisation.apply(images)
        return images.to(torch.float32)

    def _with(self, images: Tensor, labels: Tensor, ids: Sequence[str]) -> ImageSet:
        return ImageSet(images, labels, self.normalisation, self.augment, ids)


Images = ImageSet | Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor]
"""What `ImageSet.of` accepts."""


def _collated(data: Dataset[Any] | DataLoader[Any], name: str) -> Iterator[Any]:
    """Yield the batches of a data set or a loader, in the data set's order."""
    try:
        yield from _in_order(data, name) if isinstance(data, DataLoader) else DataLoader(data, _READ)
    except TypeError as error:
        if "default_collate" not in str(error):
            raise
        why = str(error).partition("found ")[2] or str(error)
        raise DataError(
            f"the {name} set does not hold tensors", f"it holds {why}", "add transforms.ToTensor() to the data set"
        ) from error
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise _differing(name, str(error).partition("but ")[2]) from error


def _differing(name: str, why: str) -> DataError:
    return DataError(f"the images of the {name} set differ in size", why, "resize them in the data set's transform")


def _in_order(loader: DataLoader[Any], name: str) -> Iterable[Any]:
    """Return a loader of the same samples in the order of the data set, each once."""
    sampler, order = loader.sampler, None
    if isinstance(loader.dataset, IterableDataset):
        return loader
    own = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if isinstance(sampler, SubsetRandomSampler):
        order = sorted(sampler.indices)
    elif isinstance(sampler, RandomSampler):
        own = own and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    elif not isinstance(sampler, SequentialSampler):
        own = False
    if not own:
        kind = type(sampler if loader.batch_size is not None else loader.batch_sampler).__name__
        raise UsageError(
            f"the {name} loader draws its samples with {kind}",
            "it may repeat samples or leave some out",
            "give the data set itself, or a torch.utils.data.Subset of it",
        )
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # the caller's random state stays as it is
    )


def _pair(batch: Any, name: str) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - whatever a data set yields
    """Check that a batch is (images [B, ...], class ids [B]); ids become int64."""
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    if not pair or not all(isinstance(item, Tensor) and item.ndim for item in batch):
        found = type(batch).__name__
        if isinstance(batch, list | tuple):
            found = f"{len(batch)} items ({', '.join(type(item).__name__ for item in batch)})"
        raise DataError(
            f"the {name} set does not yield (images, labels)",
            f"it yields {found}",
            "let the data set return (image tensor, class id), or give the loader a collate_fn that does",
        )
    images, labels = batch
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"the labels of the {name} set are not class ids",
            f"they are {labels.dtype} of shape {list(labels.shape)}",
            "give one integer per image",
        )
    if len(images) != len(labels):
        raise DataError(
            "images and labels differ in number",
            f"{len(images)} against {len(labels)} in the {name} set",
            "give one label per image",
        )
    return images, labels.to(torch.int64)


def random_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4 and crop each image at its own random position, all at once on the device.

    Args:
        images: [N, C, H, W].
        generator: a CPU generator.

    Returns:
        A tensor of the same shape.
    """
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images.permute(0, 2, 3, 1), (0, 0) + (_PADDING,) * 4).contiguous()
    line = (width + 2 * _PADDING) * channels
    offset = torch.randint(0, 2 * _PADDING + 1, (2, count), generator=generator).to(images.device)
    top = torch.arange(count, device=images.device) * (height + 2 * _PADDING) + offset[0]
    rows = top[:, None] + torch.arange(height, device=images.device)
    starts = rows * line + offset[1, :, None] * channels
    # A view with one overlapping row for each position of the padded batch: it costs no memory, and index_select copies
    # whole rows instead of single pixels.
    every = padded.as_strided((padded.numel() - width * channels + 1, width * channels), (1, 1))
    cropped = every.index_select(0, starts.flatten())
    return cropped.view(count, height, width, channels).permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image [N, C, H, W] left to right with probability 1/2."""
    flip = torch.rand(len(images), generator=generator).lt(0.5)
    source = torch.arange(len(images)).where(~flip, len(images) - 1 + flip.cumsum(0)).to(images.device)
    mirrored = _taken(images, flip.nonzero().flatten().to(images.device)).flip(3)
    return _taken(torch.cat([images, mirrored]), source)


def _taken(images: Tensor, index: Tensor) -> Tensor:
    """Return images by index [K]; channels-last images keep their layout and are copied image by image."""
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return images.index_select(0, index)


def fitted(images: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Convert images to the channels and the size of a model's input.

    RGB becomes luma for one channel; grey is repeated for three channels. Images of another size are resized (bilinear,
    with antialiasing) to cover the new size, then centre-cropped, like training images during decoding.

    Args:
        images: uint8 [B, C, H, W].
        channels: 1, 3 or the number of channels of the images.
        height: target height in pixels.
        width: target width in pixels.

    Returns:
        uint8 [B, channels, height, width]; the same tensor if the images fit already.

    Raises:
        DataError: the tensor does not hold images, or its channels cannot be converted.
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
        "the images do not fit the model",
        f"they have {found} channels, it takes {channels}",
        "use a model for such images",
    )


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if tuple(images.shape[2:]) == (height, width):
        return images
    scale = max(height / images.shape[2], width / images.shape[3])
    size = max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale))
    smooth = interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return smooth[..., top : top + height, left : left + width].round_().clamp_(0, 255).to(torch.uint8)
