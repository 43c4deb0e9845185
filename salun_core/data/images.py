"""Decoded images: stored as uint8 on the device, normalised and augmented there in batches.

uint8 takes a quarter of the memory of float32, so a whole data set fits on a GPU and batches need no transfer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

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
_COUNTED = 1 << 22  # pixels that are counted at once
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
        return cls.counted(torch.split(images, max(1, _COUNTED // max(1, images[:1].numel()))))

    @classmethod
    def counted(cls, parts: Iterable[Tensor]) -> Normalisation:
        """Compute the normalisation of uint8 images that come in parts [N, C, H, W], at least one.

        How often each pixel value occurs is counted in integers, so the result does not depend on the parts.
        """
        counts: Any = 0
        for part in parts:
            channels = part.transpose(0, 1).flatten(1)
            counts = counts + torch.stack([torch.bincount(pixels, minlength=256) for pixels in channels]).cpu()
        mean, std = zip(*(_moments(channel) for channel in counts.tolist()), strict=True)
        return cls(mean, std)

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


def _moments(counts: Sequence[int]) -> tuple[float, float]:
    """Return mean and standard deviation of pixels in [0, 1] from the number of each value; 1 for a deviation of 0."""
    number = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    if number < 2:
        return (total / 255 if number else math.nan), math.nan
    deviation = math.sqrt(Fraction(squares * number - total * total, number * (number - 1) * 255**2))
    return round(total / (number * 255), 6), round(deviation, 6) if deviation >= 1e-6 else 1.0


Part = Callable[[int], slice]
"""Size of a batch -> the positions of it that one of several processes reads."""


@runtime_checkable
class ImageSource(Protocol):
    """Labelled images of one split, wherever their pixels are.

    `ImageSet` has them in memory, and `StreamedImages` reads them from a file. Both give the same batches, bit by bit:
    order and augmentation depend on the generator alone. Labels and ids are always in memory.
    """

    @property
    def labels(self) -> Tensor:
        """Labels, int64 [N], on the device that batches are on."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """Sample ids; empty if they are not known."""
        ...

    @property
    def normalisation(self) -> Normalisation | None:
        """What is applied to uint8 images in batches."""
        ...

    @property
    def augment(self) -> str:
        """`none`, `crop` (pad by 4, random crop) or `crop-flip`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> ImageSource:
        """Return the set with its labels and its batches on a device."""
        ...

    def select(self, indices: Sequence[int] | Tensor) -> ImageSource:
        """Return the rows at these indices."""
        ...

    def relabelled(self, labels: Tensor) -> ImageSource:
        """Return the same images with other labels, int64 [N]."""
        ...

    def normalised_by(self, normalisation: Normalisation | None) -> ImageSource:
        """Return the same images with another normalisation."""
        ...

    def joined(self, other: ImageSource) -> ImageSource:
        """Return this set followed by another of the same kind.

        Raises:
            DataError: the sets differ in type, size, normalisation, or in where their pixels are.
        """
        ...

    def measured(self) -> Normalisation:
        """Compute the normalisation of these images."""
        ...

    def ready(self) -> None:
        """Make all of these images fast to read in any order; `batches` does it too."""
        ...

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return images [N, C, H, W] as they are stored: uint8, or float32 that is already normalised."""
        ...

    def batches(
        self, size: int, generator: torch.Generator | None = None, augment: bool = False, part: Part | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (normalised float32 images [B, C, H, W], labels [B]).

        Args:
            size: batch size B; the last batch may be smaller.
            generator: a CPU generator that shuffles the order and draws the augmentation; None keeps the order.
            augment: whether to augment; needs the generator.
            part: the positions of each batch that are read and yielded; None takes all. The generator is used as for
                the whole batch, so the parts of several processes are together the batches of one.
        """
        ...


def drawn_batches(
    source: ImageSource,
    read: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    size: int,
    generator: torch.Generator | None,
    augment: bool,
    part: Part | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a source; see `ImageSource.batches`.

    `read` maps the indices of the images to read of each batch to the images as stored, on the labels' device.
    """
    order = torch.arange(len(source)) if generator is None else torch.randperm(len(source), generator=generator)
    whole = torch.split(order.to(source.labels.device), size)
    cuts = [(len(index), part(len(index)) if part else slice(None)) for index in whole]
    parts = [index[cut] for index, (_, cut) in zip(whole, cuts, strict=True)]
    for of, index, images in zip(cuts, parts, read(parts), strict=True):
        if augment and generator is not None and source.augment != "none":
            images = random_crop(images, generator, of)
            images = random_flip(images, generator, of) if source.augment == "crop-flip" else images
        if source.normalisation is not None and images.dtype == torch.uint8:
            yield source.normalisation.apply(images), source.labels[index]
        else:
            yield images.to(torch.float32), source.labels[index]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split in memory, on the device: an `ImageSource`.

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
    def of(cls, data: Images, name: str = "image") -> ImageSource:
        """Accept an image source, a pair (images [N, ...], class ids [N]), a torch data set, or a data loader.

        A data set is read once, in its order, and kept in memory. So is the data set of a loader, with the loader's
        `collate_fn` and workers: its `shuffle`, `batch_size` and `drop_last` have no effect. A loader of an
        `IterableDataset` is read as it comes; a sampler that may repeat or omit samples is an error. Random transforms
        are drawn once, in this call.
        """
        if isinstance(data, ImageSource):
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.images.shape[1:])

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

    def normalised_by(self, normalisation: Normalisation | None) -> ImageSet:
        """Return the same images with another normalisation."""
        return replace(self, normalisation=normalisation)

    def joined(self, other: ImageSource) -> ImageSet:
        """Return this set followed by another one that is in memory and has the same type, size and normalisation."""
        if not isinstance(other, ImageSet):
            raise not_joined("one is in memory, the other in a file")
        kinds = {(item.images.dtype, item.images.shape[1:], item.normalisation) for item in (self, other)}
        if len(kinds) > 1:
            raise not_joined("they differ in type, size or normalisation")
        ids = [*self.ids, *other.ids] if self.ids and other.ids else ()
        return self._with(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]), ids)

    def measured(self) -> Normalisation:
        """Compute the normalisation of these images."""
        return Normalisation.of(self.images)

    def ready(self) -> None:
        """Do nothing: images in memory are fast to read."""

    def pixels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return images by index, as they are stored."""
        return _taken(self.images, torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device))

    def batches(
        self, size: int, generator: torch.Generator | None = None, augment: bool = False, part: Part | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (normalised float32 images, labels); see `ImageSource.batches`."""
        return drawn_batches(self, lambda parts: map(self.pixels, parts), size, generator, augment, part)

    def _with(self, images: Tensor, labels: Tensor, ids: Sequence[str]) -> ImageSet:
        return ImageSet(images, labels, self.normalisation, self.augment, ids)


def not_joined(why: str) -> DataError:
    """Return the error for two sets that cannot be joined."""
    return DataError("two image sets cannot be joined", why, "load both in the same way")


Images = ImageSource | Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor]
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


def random_crop(images: Tensor, generator: torch.Generator, of: tuple[int, slice] | None = None) -> Tensor:
    """Pad images [N, C, H, W] by 4 and crop each at its own random position, all at once on the device.

    The generator is a CPU generator. `of` is the size of the batch that positions are drawn for and the slice of it
    that the images are; None means all.
    """
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images.permute(0, 2, 3, 1), (0, 0) + (_PADDING,) * 4).contiguous()
    line = (width + 2 * _PADDING) * channels
    drawn, cut = of or (count, slice(None))
    offset = torch.randint(0, 2 * _PADDING + 1, (2, drawn), generator=generator)[:, cut].to(images.device)
    top = torch.arange(count, device=images.device) * (height + 2 * _PADDING) + offset[0]
    rows = top[:, None] + torch.arange(height, device=images.device)
    starts = rows * line + offset[1, :, None] * channels
    # A view with one overlapping row for each position of the padded batch: it costs no memory, and index_select copies
    # whole rows instead of single pixels.
    every = padded.as_strided((padded.numel() - width * channels + 1, width * channels), (1, 1))
    cropped = every.index_select(0, starts.flatten())
    return cropped.view(count, height, width, channels).permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator, of: tuple[int, slice] | None = None) -> Tensor:
    """Mirror each image [N, C, H, W] left to right with probability 1/2; `of` as in `random_crop`."""
    drawn, cut = of or (len(images), slice(None))
    flip = torch.rand(drawn, generator=generator)[cut].lt(0.5)
    source = torch.arange(len(images)).where(~flip, len(images) - 1 + flip.cumsum(0)).to(images.device)
    mirrored = _taken(images, flip.nonzero().flatten().to(images.device)).flip(3)
    return _taken(torch.cat([images, mirrored]), source)


def _taken(images: Tensor, index: Tensor) -> Tensor:
    """Return images by index [K]; channels-last images keep their layout and are copied image by image."""
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return images.index_select(0, index)


def fitted(images: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Convert uint8 images [B, C, H, W] to the channels and the size of a model's input.

    RGB becomes luma for one channel; grey is repeated for three channels. Images of another size are resized (bilinear,
    with antialiasing) to cover the new size, then centre-cropped, like training images during decoding. Images that fit
    already are returned as they are.
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
