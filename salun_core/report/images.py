"""The grids of generated images before and after.

The evidence may come from elsewhere, so that an image is embedded only if it is a valid PNG or JPEG.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from salun_core.report.plots import STATES, label

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Grid

MAX_GRIDS = 4
MAX_IMAGE_CHARS = 340_000  # eight of them, 250 kB each before base64, fit into a page with all other pictures
MAX_SIDE = 4096
_URI = re.compile(r"data:image/(png|jpeg);base64,")
_SMALL = 600  # pixels: a smaller image is shown enlarged, and smoothing would blur it


class RowLabel(NamedTuple):
    """Class or prompt of one row of images."""

    short: str
    full: str
    forgotten: bool


class Image(NamedTuple):
    """One grid of images, ready to be embedded."""

    title: str
    uri: str
    alt: str
    width: int
    height: int
    small: bool


class Picture(NamedTuple):
    """The grids of one set of rows for the model before and after, or the problem that keeps them from being shown."""

    title: str
    rows: list[RowLabel]
    images: list[Image]
    blurred: bool
    problem: str = ""


def pictures(grids: Sequence[Grid]) -> list[Picture]:
    """Return the grids to show, at most `MAX_GRIDS`; one that cannot be embedded has a `problem` and no images."""
    found = [_picture(grid) for grid in grids[:MAX_GRIDS]]
    rest = len(grids) - MAX_GRIDS
    if rest > 0:
        found.append(Picture("", [], [], False, f"{rest} more left out: a page shows {MAX_GRIDS} grids."))
    return found


def _picture(grid: Grid) -> Picture:
    title = label(grid.title, 80)
    rows = [
        RowLabel(label(text, 60), label(text, 400), place in grid.forgotten) for place, text in enumerate(grid.rows)
    ]
    names = "; ".join(f"{row.short} (to be forgotten)" if row.forgotten else row.short for row in rows)
    kind = "blurred generated images" if grid.blurred else "generated images"
    images = []
    for state, uri in (("before", grid.before), ("after", grid.after)):
        size, problem = check_image(uri)
        if problem:
            return Picture(title, rows, [], grid.blurred, f"“{title}” left out: the image {state} {problem}.")
        alt = f"{STATES[state]}: {len(rows)} rows of {kind}, {title}. From the top: {names}."
        images.append(Image(STATES[state], uri, alt, *size, small=max(size) < _SMALL))
    return Picture(title, rows, images, grid.blurred)


def check_image(uri: str) -> tuple[tuple[int, int], str]:
    """Check that a URI is a complete PNG or JPEG in base64, and no larger than a page can hold.

    Nothing else is ever loaded. Returns (width, height) in pixels and "", or zeros and the problem.
    """
    match = _URI.match(uri)
    if match is None:
        return (0, 0), "is not a data: URI of a PNG or JPEG in base64"
    if len(uri) > MAX_IMAGE_CHARS:
        return (0, 0), f"is longer than {MAX_IMAGE_CHARS:,} characters"
    kind = match.group(1).upper()
    try:
        size = _size(base64.b64decode(uri[match.end() :], validate=True), kind)
    except (ValueError, OSError, SyntaxError, Warning):  # SyntaxError is Pillow's for a broken PNG
        return (0, 0), f"does not decode as {kind}"
    return (size, "") if max(size) <= MAX_SIDE else ((0, 0), f"is larger than {MAX_SIDE:,} pixels")


def _size(data: bytes, kind: str) -> tuple[int, int]:
    from PIL import Image as Pillow

    with warnings.catch_warnings():
        warnings.simplefilter("error", Pillow.DecompressionBombWarning)
        try:
            with Pillow.open(io.BytesIO(data), formats=[kind]) as image:
                image.verify()
                return image.size
        except Pillow.DecompressionBombError as error:
            raise ValueError(str(error)) from error


def without_images(document: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of evidence as JSON; a size and digest replace each image, which the page already shows."""
    made = document.get("generation")
    if not made:
        return document

    def described(uri: str) -> str:
        return f"not repeated here: {len(uri)} characters, sha256:{hashlib.sha256(uri.encode()).hexdigest()}"

    grids = [{**grid, **{state: described(grid[state]) for state in ("before", "after")}} for grid in made["grids"]]
    return {**document, "generation": {**made, "grids": grids}}
