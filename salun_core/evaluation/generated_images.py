"""Evaluation of a diffusion model by the images that it generates before and after unlearning."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salun_core.errors import DataError, UsageError
from salun_core.evaluation.classifier import confusion
from salun_core.evaluation.clip_score import ClipScorer
from salun_core.evaluation.evidence import (
    ClassAccuracy,
    CurvePoint,
    DiffusionFacts,
    Evidence,
    Forgotten,
    Grid,
    Measured,
    Metric,
    RunFacts,
)
from salun_core.evaluation.image_classifier import ImageClassifier, as_asked
from salun_core.evaluation.image_features import Extractor, features_of, frechet_of, joined_features, kernel_of
from salun_core.evaluation.integrity import compare_weights
from salun_core.evaluation.nudity import NudityDetector, count_parts
from salun_core.evaluation.outputs import Outputs
from salun_core.evaluation.statistics import wilson_interval
from salun_core.saliency import SaliencyMask

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


_MEASURED = {"UA", "RA", "neighbours", "FID", "KID", "CLIP", "nudity"}

Sample = Callable[[Sequence[int], Sequence[int]], Iterator[Tensor]]
"""(row of each image, seed of each image) -> batches of uint8 [B, 3, H, W], in that order."""


@dataclass(frozen=True)
class SamplingPlan:
    """Which images every model generates.

    Args:
        rows: class or prompt of each row of images; CLIP compares the images with it.
        forgotten: rows that are to be forgotten.
        labels: the judge's class id of each row, None for a row that it knows no class for.
        neighbours: rows near the forgotten ones.
        watched: rows besides the forgotten ones in which nudity is looked for.
        per_row: images a row.
        seed: of the first image; the others count on from it, row after row.
        sampler: class of the sampler.
        steps: denoising steps an image.
        guidance_scale: classifier-free guidance; 1 is none.
        blur: whether the images are shown blurred.
        title: what the rows are.
    """

    rows: Sequence[str]
    forgotten: Sequence[int]
    labels: Sequence[int | None]
    neighbours: Sequence[int] = ()
    watched: Sequence[int] = ()
    per_row: int = 32
    seed: int = 0
    sampler: str = "unknown"
    steps: int = 1
    guidance_scale: float = 1.0
    blur: bool = False
    title: str = "classes"


@dataclass(frozen=True)
class Evaluators:
    """Who looks at the images; whoever is missing leaves its metrics out.

    Args:
        classifier: recognises classes: UA, RA, neighbours.
        extractor: whose features FID and KID compare.
        real: real images of the kept rows, uint8 [N, 1 or 3, H, W], for FID and KID.
        clip: scores images with the names of their rows.
        detector: finds nudity.
    """

    classifier: ImageClassifier | None = None
    extractor: Extractor | None = None
    real: Tensor | None = None
    clip: ClipScorer | None = None
    detector: NudityDetector | None = None


@dataclass(frozen=True)
class _Seen:
    """What is kept of one model's images."""

    predictions: np.ndarray  # int64 [N]; -1 without a judge
    features: Tensor  # float32 [K, F], of the kept rows
    clip: Tensor  # float64 [K], of the kept rows
    detections: list[dict[str, int]]
    thumbnails: Tensor


def evaluate_generated_images(
    before: Sample,
    after: Sample,
    networks: tuple[nn.Module, nn.Module],
    plan: SamplingPlan,
    evaluators: Evaluators,
    measured: Measured,
    forgotten: Forgotten,
    mask: SaliencyMask | None = None,
    run: RunFacts | None = None,
    extra: Mapping[str, Metric] | None = None,
    resurgence: Sequence[CurvePoint] = (),
    reference: Sample | None = None,
) -> Evidence:
    """Measure forgetting and quality in images that every model generates from the same rows and seeds.

    UA = share of images of the forgotten rows that the judge does not recognise; RA = share of those of the other rows
    that it does; `neighbours` = the same of the rows near the forgotten ones; FID, KID and CLIP on the kept rows;
    `nudity` = share of the watched rows' images with an exposed part. A metric that nobody can measure is absent.

    Args:
        before: generates with the original model.
        after: generates with the unlearned model.
        networks: the denoisers before and after, compared bit by bit.
        plan: rows, seeds and how the images are made.
        evaluators: who looks at the images.
        measured: digests of everything that is measured here.
        forgotten: what was asked for.
        mask: weights outside it must have kept their bits.
        run: how `after` was made.
        extra: metrics that were measured elsewhere, such as UA_relearned.
        resurgence: what fine-tuning on what was kept brought back.
        reference: generates with a model that was retrained without the set.

    Returns:
        The evidence.

    Raises:
        UsageError: the plan is empty or names rows or classes that do not exist, or `extra` names a metric of ours.
        ModelError: a sampler yields other images than it was asked for, or the models do not fit each other.
        DataError: the real images are no images.
    """
    _check(plan, evaluators, extra or {})
    integrity = compare_weights(*networks, mask)  # cheap, and generating is not
    samples = {"before": before, "after": after} | ({"reference": reference} if reference else {})
    seen = {state: _look(sample, plan, evaluators, state) for state, sample in samples.items()}
    metrics = _recognised(seen, plan) | _distances(seen, evaluators) | _clip(seen) | _nudity(seen)
    return Evidence(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=measured,
        forgotten=forgotten,
        integrity=integrity,
        metrics={**metrics, **(extra or {})},
        per_class=_by_row(seen, plan) if evaluators.classifier else [],
        confusion=_confusion(seen["after"], plan, len(evaluators.classifier.classes)) if evaluators.classifier else [],
        classes=evaluators.classifier.classes if evaluators.classifier else list(plan.rows),
        run=run or RunFacts(),
        generation=_generation(seen, plan, evaluators, "FID" in metrics, resurgence),
    )


def _check(plan: SamplingPlan, evaluators: Evaluators, extra: Mapping[str, Metric]) -> None:
    for name in _MEASURED & {*extra}:
        raise UsageError(f"metric {name} cannot be given", "it is measured on the images", "leave it out")
    rows = range(len(plan.rows))
    classes = len(evaluators.classifier.classes) if evaluators.classifier else None
    faults = {
        "it has no rows or no images": not plan.rows or plan.per_row < 1,
        f"it has {len(plan.labels)} labels for {len(rows)} rows": len(plan.labels) != len(rows),
        "it names no row to forget": not plan.forgotten,
        "it names a row that is not there": not {*plan.forgotten, *plan.neighbours, *plan.watched} <= {*rows},
        "a row is both forgotten and a neighbour": bool({*plan.forgotten} & {*plan.neighbours}),
        "a label is no class of the judge": classes is not None
        and any(label is not None and not 0 <= label < classes for label in plan.labels),
    }
    for why, found in faults.items():
        if found:
            raise UsageError("nothing can be generated by this plan", why, "correct the plan")


def _look(sample: Sample, plan: SamplingPlan, evaluators: Evaluators, state: str) -> _Seen:
    """Classify a model's images batch after batch; of the images themselves only thumbnails are kept."""
    rows = np.repeat(np.arange(len(plan.rows)), plan.per_row)
    kept = ~np.isin(rows, plan.forgotten)
    watched = np.isin(rows, [*plan.forgotten, *plan.watched])
    shown = np.isin(rows, rows_shown(plan.forgotten, plan.neighbours, len(plan.rows)))
    shown &= np.tile(np.arange(plan.per_row) < COLUMNS, len(plan.rows))
    predictions, features, clip, small = [np.empty(0, np.int64)], [], [torch.empty(0, dtype=torch.float64)], []
    detections, at = list[dict[str, int]](), 0
    for images in as_asked(sample(rows.tolist(), range(plan.seed, plan.seed + len(rows))), len(rows), state):
        these = slice(at, at := at + len(images))
        keep = images[torch.from_numpy(kept[these]).to(images.device)]
        if evaluators.classifier:
            predictions.append(evaluators.classifier.predict(images).numpy())
        if evaluators.extractor and evaluators.real is not None and len(keep):
            features.append(evaluators.extractor.features(keep).cpu())
        if evaluators.clip and len(keep):
            clip.append(evaluators.clip.scores(keep, [plan.rows[row] for row in rows[these][kept[these]]]))
        if evaluators.detector:
            detections += evaluators.detector.detect(images[torch.from_numpy(watched[these]).to(images.device)])
        small.append(thumbnails(images[torch.from_numpy(shown[these]).to(images.device)]))
    called = np.concatenate(predictions) if evaluators.classifier else np.full(len(rows), -1)
    joined = joined_features(features, evaluators.extractor.name if evaluators.extractor else "")
    return _Seen(called, joined, torch.cat(clip), detections, torch.cat(small))


def _labels(plan: SamplingPlan) -> np.ndarray:
    """The judge's class of each image, -2 where there is none: a judge that is missing says -1."""
    return np.repeat([-2 if label is None else label for label in plan.labels], plan.per_row)


def _share(shares: Mapping[str, np.ndarray]) -> Metric:
    n, values = len(shares["after"]), {state: float(share.mean()) for state, share in shares.items()}
    low, high = wilson_interval(values["after"], n)
    return Metric(**values, n=n, low=low, high=high)


def _recognised(seen: Mapping[str, _Seen], plan: SamplingPlan) -> dict[str, Metric]:
    rows, labels = np.repeat(np.arange(len(plan.rows)), plan.per_row), _labels(plan)
    known = (labels >= 0) & (seen["after"].predictions >= 0)
    gone = np.isin(rows, plan.forgotten)
    groups = {"UA": known & gone, "RA": known & ~gone, "neighbours": known & np.isin(rows, plan.neighbours)}
    return {
        name: _share({state: ((item.predictions == labels) ^ (name == "UA"))[chosen] for state, item in seen.items()})
        for name, chosen in groups.items()
        if chosen.any()
    }


def _distances(seen: Mapping[str, _Seen], evaluators: Evaluators) -> dict[str, Metric]:
    n = len(seen["after"].features)
    if evaluators.extractor is None or evaluators.real is None or n == 0:
        return {}
    real = features_of(evaluators.extractor, torch.split(evaluators.real, 256))
    metrics = {}
    for name, distance in (("FID", frechet_of), ("KID", kernel_of)):
        values = {state: distance(real, item.features) for state, item in seen.items()}
        if all(value is not None for value in values.values()):
            metrics[name] = Metric(**values, n=n)
    return metrics


def _clip(seen: Mapping[str, _Seen]) -> dict[str, Metric]:
    values, n = {state: float(item.clip.mean()) for state, item in seen.items()}, len(seen["after"].clip)
    return {"CLIP": Metric(**values, n=n)} if n else {}


def _nudity(seen: Mapping[str, _Seen]) -> dict[str, Metric]:
    shares = {state: np.array([bool(counts) for counts in item.detections]) for state, item in seen.items()}
    return {"nudity": _share(shares)} if len(shares["after"]) else {}


def _by_row(seen: Mapping[str, _Seen], plan: SamplingPlan) -> list[ClassAccuracy]:
    """Accuracy of each row that has a label."""
    found = []
    for row, (name, label) in enumerate(zip(plan.rows, plan.labels, strict=True)):
        if label is not None:
            at = slice(row * plan.per_row, (row + 1) * plan.per_row)
            values = {state: float((seen[state].predictions[at] == label).mean()) for state in ("before", "after")}
            found.append(ClassAccuracy(class_id=label, name=name, n=plan.per_row, **values))
    return found


def _confusion(after: _Seen, plan: SamplingPlan, num_classes: int) -> list[list[int]]:
    labels = _labels(plan)
    certain = np.eye(num_classes)[after.predictions[labels >= 0]]
    return confusion(Outputs(certain, np.zeros(len(certain)), labels[labels >= 0]), num_classes)


def _generation(
    seen: Mapping[str, _Seen],
    plan: SamplingPlan,
    evaluators: Evaluators,
    compared: bool,
    resurgence: Sequence[CurvePoint],
) -> DiffusionFacts:
    shown, columns = rows_shown(plan.forgotten, plan.neighbours, len(plan.rows)), min(COLUMNS, plan.per_row)
    grid = Grid(
        title=plan.title,
        rows=[plan.rows[row] for row in shown],
        before=grid_image(seen["before"].thumbnails, columns, plan.blur),
        after=grid_image(seen["after"].thumbnails, columns, plan.blur),
        forgotten=[position for position, row in enumerate(shown) if row in plan.forgotten],
        blurred=plan.blur,
    )
    return DiffusionFacts(
        sampler=plan.sampler,
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        seed=plan.seed,
        images=len(plan.rows) * plan.per_row,
        judge=evaluators.classifier.digest if evaluators.classifier else None,
        extractor=evaluators.extractor.name if evaluators.extractor and compared else None,
        real_images=len(evaluators.real) if evaluators.real is not None and compared else 0,
        clip=evaluators.clip.digest if evaluators.clip else None,
        detector=evaluators.detector.digest if evaluators.detector else None,
        parts=count_parts(seen["before"].detections, seen["after"].detections),
        resurgence=list(resurgence),
        grids=[grid],
    )
