"""Decodes images once into one uint8 tensor, which takes a quarter of the memory of floats."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from salun_core.data.spec import DataSpec
from salun_core.data.table import Payload
from salun_core.errors import DataError, UsageError

# Pillow warns above this number of pixels and raises above twice as many: decompression bombs must not fill memory.
Image.MAX_IMAGE_PIXELS = 64 * 1024 * 1024
MEMORY_VARIABLE = "SALUN_IMAGE_MEMORY"
_DEFAULT_GB = 4.0
_CHUNK = 256  # images for one task of a thread, whose start costs as much as a small image
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF")  # others may start programs: EPS runs Ghostscript


def fits_memory(spec: DataSpec, count: int, encoded: int, first: Callable[[], Payload]) -> bool:
    """Return whether images fit `SALUN_IMAGE_MEMORY`, encoded (`encoded` bytes) and decoded together.

    `first` returns the first payload; it is called only if the spec does not give the size.
    """
    text = os.environ.get(MEMORY_VARIABLE, "").strip()
    try:
        limit = float(text or _DEFAULT_GB)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise UsageError(
            f"{MEMORY_VARIABLE} is not a size", f"it is {text[:40]!r}", "give gigabytes, such as 8; 0 streams images"
        )
    if limit == 0:
        return False
    used = min(count, (spec.train_limit or count) + (spec.test_limit or count))
    return encoded + used * _pixels(spec, first) <= limit * 1e9


def _pixels(spec: DataSpec, first: Callable[[], Payload]) -> int:
    """Return the size of a decoded image in bytes; 0 if the first one is corrupt, which decoding reports."""
    if spec.size:
        return spec.size * spec.size * (spec.channels or 3)
    try:
        payload = first()
        height, width = payload.shape[:2] if isinstance(payload, np.ndarray) else _open(payload, "").size
    except DataError:
        return 0
    return int(height) * int(width) * (spec.channels or 3)


def decode(payloads: Sequence[Payload], ids: Sequence[str], size: int | None, channels: int | None) -> Tensor:
    """Decode images into uint8 [N, channels, H, W] in channels-last layout, which crops and convolutions read fastest.

    The short side is resized to `size` pixels and the centre is cropped; None requires images of equal sizes.
    `channels` is 1 or 3; None uses the first image's.
    """
    if not payloads:
        raise DataError("there are no images", "the selection is empty", "check the data set and its limits")
    channels = channels or channels_of(payloads[0], ids[0])
    first = decode_one(payloads[0], ids[0], size, channels)
    pixels = np.empty((len(payloads), *first.shape), np.uint8)

    def fill(start: int) -> list[tuple[str, tuple[int, ...]]]:
        """Decode a chunk; return the images of another shape, which are an error once all are known to be intact."""
        others = []
        for index in range(start, min(start + _CHUNK, len(payloads))):
            array = decode_one(payloads[index], ids[index], size, channels)
            if array.shape == first.shape:
                pixels[index] = array
            else:
                others.append((ids[index], array.shape))
        return others

    with ThreadPoolExecutor(max_workers=2) as pool:  # Pillow releases the interpreter lock while it decodes
        others = [other for found in pool.map(fill, range(0, len(payloads), _CHUNK)) for other in found]
    if others:
        raise another_size(*others[0], first.shape)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def another_size(sample: str, shape: Sequence[int], first: Sequence[int]) -> DataError:
    """Return the error for an image whose height and width differ from those of the first one."""
    return DataError(
        f"image {sample} has another size",
        f"{shape[1]} x {shape[0]}; the first image has {first[1]} x {first[0]}",
        "set `size` in the data spec to resize all",
        public="an image of the data has another size than the first one",
    )


def channels_of(payload: Payload, sample: str) -> int:
    """Return 1 for a grey image, 3 for a colour image."""
    if isinstance(payload, np.ndarray):
        return int(payload.shape[2])
    return 1 if _open(payload, sample).mode in ("1", "L", "I;16") else 3


def _open(payload: bytes, sample: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(payload), formats=FORMATS)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = str(error).split("\n")[0]
        if isinstance(error, UnidentifiedImageError):  # whose text is the address of the buffer
            why = f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image" if payload else "it is empty"
        raise DataError(
            f"image {sample} is corrupt",
            why,
            "replace it, or take it out of the data",
            public="an image of the data is corrupt",
        ) from error
    return image


def decode_one(payload: Payload, sample: str, size: int | None, channels: int) -> np.ndarray:
    """Decode an image to uint8 [H, W, channels]; arguments as for `decode`."""
    if isinstance(payload, np.ndarray) and size is None and payload.shape[2] == channels:
        return payload
    image = Image.fromarray(payload.squeeze()) if isinstance(payload, np.ndarray) else _open(payload, sample)
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if size is not None and image.size != (size, size):
        image = _resize(image, size)
    array = np.asarray(image, dtype=np.uint8)
    return array if array.ndim == 3 else array[..., None]


def _resize(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
