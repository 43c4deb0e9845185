"""Grids of generated images for the report, each as one data: URI of bounded length."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate

from salun_core.errors import DataError

SIDE = 96
"""Longest side of a thumbnail in pixels."""

LIMIT = 250_000
"""Most characters of one grid: a report with some of them stays a file that can be mailed."""

COLUMNS, ROWS = 8, 40
"""Most images a row, and rows, of one grid."""

_PNG_LIMIT = 200_000
_GAP = 2
_QUALITY = 85
_SMALLEST = 8


def rows_shown(forgotten: Sequence[int], neighbours: Sequence[int], count: int) -> list[int]:
    """Choose the rows of a grid: the forgotten ones, then their neighbours, then the others, while there is room.

    Args:
        forgotten: rows that were to be forgotten.
        neighbours: rows near them.
        count: number of rows in all.

    Returns:
        At most `ROWS` of them, in their order.
    """
    return sorted(list(dict.fromkeys([*forgotten, *neighbours, *range(count)]))[:ROWS])


def thumbnails(images: Tensor, side: int = SIDE) -> Tensor:
    """Shrink images whose longer side is longer than allowed; smaller ones stay as they are.

    Args:
        images: uint8 [N, 3, H, W].
        side: in pixels.

    Returns:
        uint8 [N, 3, h, w] on the CPU.

    Raises:
        DataError: these are no such images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise DataError("these are no images", found, "give uint8 [N, 3, H, W]")
    longest = max(images.shape[2:])
    if longest <= side:
        return images.cpu()
    size = [max(1, round(length * side / longest)) for length in images.shape[2:]]
    if len(images) == 0:
        return torch.empty(0, 3, *size, dtype=torch.uint8)
    smooth = interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return smooth.round_().clamp_(0, 255).to(torch.uint8).cpu()


def grid_image(images: Tensor, columns: int, blur: bool = False) -> str:
    """Draw images as one grid.

    PNG where its URI has at most 200,000 characters, otherwise JPEG of quality 85; where that is longer than 250,000,
    the thumbnails shrink until it is not.

    Args:
        images: uint8 [R * columns, 3, H, W], row after row.
        columns: images a row.
        blur: whether to blur each image beyond recognition.

    Returns:
        A data: URI of at most `LIMIT` characters.

    Raises:
        DataError: these are no such images, or they fill no whole rows.
    """
    if columns < 1 or len(images) == 0 or len(images) % columns:
        raise DataError("images fill no grid", f"{len(images)} images in {columns} columns", "give whole rows")
    tiles = thumbnails(images)
    while True:
        grid = _tiled(tiles, columns, blur)
        uri = _encoded(grid)
        longest = max(tiles.shape[2:])
        if len(uri) <= LIMIT:
            return uri
        if longest <= _SMALLEST:
            raise DataError(
                f"a grid of {len(images)} images is too large for a report", f"{len(uri)} characters", "show fewer rows"
            )
        side = max(_SMALLEST, min(longest - 1, int(longest * (LIMIT / len(uri)) ** 0.5)))
        tiles = thumbnails(images, side)


def _tiled(tiles: Tensor, columns: int, blur: bool) -> Image.Image:
    height, width = tiles.shape[2:]
    rows = len(tiles) // columns
    size = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    grid = Image.new("RGB", size, "white")
    for index, pixels in enumerate(tiles.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(index, columns)
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        if blur:  # each by itself: no colour runs into its neighbour
            tile = tile.filter(ImageFilter.GaussianBlur(max(height, width) / 6))
        grid.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
    return grid


def _encoded(grid: Image.Image) -> str:
    uri = _uri(grid, "png")
    return uri if len(uri) <= _PNG_LIMIT else _uri(grid, "jpeg", quality=_QUALITY)


def _uri(grid: Image.Image, kind: str, **options: int) -> str:
    memory = io.BytesIO()
    grid.save(memory, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(memory.getvalue()).decode()}"
