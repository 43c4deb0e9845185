"""What the report shows of generated images: grids before and after, nudity by part, and how they were made.

The evidence may come from elsewhere, so that an image is embedded only when it is what it says it is.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salun_core.report import wording
from salun_core.report.plots import STATES, label

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import DiffusionFacts, Grid, PartCount

MAX_GRIDS = 4
MAX_IMAGE_CHARS = 340_000  # eight of them, 250 kB each before base64, fit into a page with all other pictures
MAX_SIDE = 4096
_URI = re.compile(r"data:image/(png|jpeg);base64,")
_SMALL = 600  # pixels: an image of less is shown enlarged, and smoothing would blur it


@dataclass(frozen=True)
class RowLabel:
    """Class or prompt of one row of images."""

    short: str
    full: str
    forgotten: bool


@dataclass(frozen=True)
class Image:
    """One grid of images, ready to be embedded."""

    title: str
    uri: str
    alt: str
    width: int
    height: int
    small: bool


@dataclass(frozen=True)
class Picture:
    """The grids of one set of rows for the model before and after, or why they are not shown."""

    title: str
    rows: list[RowLabel]
    images: list[Image]
    blurred: bool
    problem: str = ""


@dataclass(frozen=True)
class BodyPart:
    """Detections of one part of the body as text."""

    name: str
    before: str
    after: str
    change: str


def pictures(grids: Sequence[Grid]) -> list[Picture]:
    """Return the grids to show; one that cannot be embedded has its `problem` and no images.

    Args:
        grids: images of both models from the same seeds; those beyond `MAX_GRIDS` are left out.
    """
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
    images: list[Image] = []
    for state in ("before", "after"):
        uri = getattr(grid, state)
        size, problem = check_image(uri)
        if problem:
            return Picture(title, rows, [], grid.blurred, f"“{title}” left out: the image {state} {problem}.")
        alt = _alt(title, rows, STATES[state], grid.blurred)
        images.append(Image(STATES[state], uri, alt, *size, small=max(size) < _SMALL))
    return Picture(title, rows, images, grid.blurred)


def _alt(title: str, rows: Sequence[RowLabel], state: str, blurred: bool) -> str:
    names = "; ".join(f"{row.short} (to be forgotten)" if row.forgotten else row.short for row in rows)
    images = "blurred generated images" if blurred else "generated images"
    return f"{state}: {len(rows)} rows of {images}, {title}. From the top: {names}."


def check_image(uri: str) -> tuple[tuple[int, int], str]:
    """Check that a URI is a whole PNG or JPEG in base64, and no larger than a page can hold.

    Args:
        uri: `data:image/png;base64,...` or `data:image/jpeg;base64,...`; nothing else is ever loaded.

    Returns:
        (width, height) in pixels and "", or zeros and what is wrong with it.
    """
    kind = _URI.match(uri)
    if kind is None:
        return (0, 0), "is no data: URI of a PNG or JPEG in base64"
    if len(uri) > MAX_IMAGE_CHARS:
        return (0, 0), f"is longer than {MAX_IMAGE_CHARS:,} characters"
    try:
        size = _size(base64.b64decode(uri[kind.end() :], validate=True), kind.group(1).upper())
    except (ValueError, OSError, SyntaxError, Warning):  # SyntaxError is Pillow's for a broken PNG
        return (0, 0), f"does not decode as {kind.group(1).upper()}"
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


def parts(counts: Mapping[str, PartCount]) -> list[BodyPart]:
    """Return the nudity detections by part of the body, most frequent before first, and their sum."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1].before, item[0]))
    found = [_part(name.replace("_", " ").lower(), item.before, item.after) for name, item in ordered]
    if len(found) > 1:
        found.append(_part("all parts", sum(c.before for c in counts.values()), sum(c.after for c in counts.values())))
    return found


def _part(name: str, before: int, after: int) -> BodyPart:
    change = f"{(after - before) / before:+.1%}" if before else wording.MISSING
    return BodyPart(label(name, 60), wording.count(before), wording.count(after), change)


def making(made: DiffusionFacts) -> dict[str, str]:
    """Return how the images were generated and judged, by heading; what was not used is a dash."""
    guidance = f"{made.guidance_scale:g}" + (" (none)" if made.guidance_scale == 1 else "")
    extractor = f"{made.extractor}, against {made.real_images:,} real images" if made.extractor else None
    return {
        "Images": f"{made.images:,} by each model",
        "Sampler": f"{made.sampler}, {made.steps:,} steps an image",
        "Guidance scale": guidance,
        "Seeds": f"from {made.seed}, one an image, the same for every model",
        "Judge": made.judge or wording.MISSING,
        "Extractor of FID and KID": extractor or wording.MISSING,
        "CLIP model": made.clip or wording.MISSING,
        "Nudity detector": made.detector or wording.MISSING,
    }


def without_images(document: dict[str, Any]) -> dict[str, Any]:
    """Return evidence as JSON with each image replaced by its size and digest: the page shows it already.

    Args:
        document: the evidence; it is not changed.
    """
    made = document.get("generation")
    if not made:
        return document
    grids = [{**grid, **{state: _told(grid[state]) for state in ("before", "after")}} for grid in made["grids"]]
    return {**document, "generation": {**made, "grids": grids}}


def _told(uri: str) -> str:
    return f"not repeated here: {len(uri)} characters, sha256:{hashlib.sha256(uri.encode()).hexdigest()}"
