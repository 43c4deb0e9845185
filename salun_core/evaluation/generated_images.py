"""Evaluation of a diffusion model by the images that it generates before and after unlearning."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.functional import interpolate

from salun_core.errors import DataError, ModelError, UsageError
from salun_core.evaluation.classifier import confusion
from salun_core.evaluation.clip_score import ClipScorer
from salun_core.evaluation.evidence import (
    Became,
    ClassAccuracy,
    CurvePoint,
    DiffusionFacts,
    Evidence,
    Forgotten,
    Grid,
    Measured,
    Metric,
    RecognitionFacts,
    RunFacts,
    SeedBatch,
)
from salun_core.evaluation.image_classifier import Calibration, ImageClassifier
from salun_core.evaluation.image_features import Extractor, frechet_distance, joined_features, kernel_distance
from salun_core.evaluation.integrity import compare_weights, with_text_encoder
from salun_core.evaluation.metrics import GENERATED, functions_of
from salun_core.evaluation.nudity import NudityDetector, count_parts
from salun_core.evaluation.outputs import Outputs
from salun_core.evaluation.statistics import clustered_share_metric, clustered_size, share_of
from salun_core.saliency import SaliencyMask

_REAL_BATCH = 256

NONE = "none of these"
"""What an image shows that is none of the image classifier's classes."""

SEED_STRIDE = 2**32
"""Distance of the first seeds of two batches: no plan has as many images."""

_SEED_BATCHES, _BATCHED_FROM = 3, 24  # batches of seeds, and the images per row from which there is more than one

Sample = Callable[[Sequence[int], Sequence[int]], Iterator[Tensor]]
"""(row of each image, seed of each image) -> batches of uint8 [B, 3, H, W], in that order."""


@dataclass(frozen=True)
class SamplingPlan:
    """The images that every model generates.

    Args:
        rows: class or prompt of each row of images; CLIP compares the images with it.
        labels: the image classifier's class id of each row, None for a row without a class.
        neighbours: rows near the forgotten ones.
        watched: rows in which nudity is detected, besides the forgotten ones.
        clip_rows: rows that the CLIP score is measured on; None: all that are not forgotten.
        distance_rows: rows that FID and KID are measured on; None: all that are not forgotten, and only if there are
            real images. Without real images these rows of the original model are compared with, from other seeds.
        seed: of the first image; see `seeds`.
        guidance_scale: classifier-free guidance; 1 is none.
        title: what the rows are.
    """

    rows: Sequence[str]
    forgotten: Sequence[int]
    labels: Sequence[int | None]
    neighbours: Sequence[int] = ()
    watched: Sequence[int] = ()
    clip_rows: Sequence[int] | None = None
    distance_rows: Sequence[int] | None = None
    per_row: int = 32
    seed: int = 0
    sampler: str = "unknown"
    steps: int = 1
    guidance_scale: float = 1.0
    blur: bool = False
    title: str = "classes"

    @cached_property
    def row_of(self) -> np.ndarray:
        """Row of each image, int64 [N]."""
        return np.repeat(np.arange(len(self.rows)), self.per_row)

    def images_of(self, rows: Sequence[int] | None) -> np.ndarray:
        """Return whether each image is of these rows, bool [N]; None: of the rows that are not forgotten."""
        return np.isin(self.row_of, self.forgotten, invert=True) if rows is None else np.isin(self.row_of, rows)

    @cached_property
    def batch_of(self) -> np.ndarray:
        """Batch of seeds of each image, int64 [N]: three in each row, or one for fewer than 24 images per row."""
        batches = _SEED_BATCHES if self.per_row >= _BATCHED_FROM else 1
        return np.tile(np.arange(self.per_row) * batches // self.per_row, len(self.rows))

    @cached_property
    def seeds(self) -> np.ndarray:
        """Seed of each image, int64 [N]: they count on row after row, from a start of its own in each batch."""
        return np.asarray(self.seed + np.arange(len(self.row_of)) + self.batch_of * SEED_STRIDE)

    @cached_property
    def label_of(self) -> np.ndarray:
        """The image classifier's class of each image, int64 [N]; -2 without one, because -1 is a missing prediction."""
        return np.repeat([-2 if label is None else label for label in self.labels], self.per_row)


@dataclass(frozen=True)
class Evaluators:
    """The models that evaluate the images; the metrics of a missing one are left out.

    Args:
        extractor: whose features FID and KID compare.
        real: real images of the retained rows, uint8 [N, 1 or 3, H, W], for FID and KID.
        detector: detects nudity.
        calibration: of the classifier, on real held-out images: none_of_these.
        kernel: whether KID is measured beside FID; it takes longer than all the rest for small images.
    """

    classifier: ImageClassifier | None = None
    extractor: Extractor | None = None
    real: Tensor | None = None
    clip: ClipScorer | None = None
    detector: NudityDetector | None = None
    calibration: Calibration | None = None
    kernel: bool = True


@dataclass(frozen=True)
class Observed:
    """What is kept of one model's images."""

    predictions: np.ndarray  # int64 [N]; -1 without an image classifier
    none: np.ndarray  # bool [F], of the forgotten rows: shows none of the classes; [0] without a calibration
    features: Tensor  # float32 [K, F], of the rows of FID and KID
    clip: Tensor  # float64 [C], of the rows of the CLIP score
    detections: list[dict[str, int]]
    thumbnails: Tensor


@dataclass(frozen=True)
class Comparison:
    """The models that an evaluation compares by their images, and what was observed in these.

    Args:
        samples: generate with each model: before, after, perhaps the `reference` that was retrained without the set.
        networks: the denoisers before and after, compared bit by bit.
        mask: weights outside it must have kept their bits.
        hybrid: generates with the unlearned model that has the class embedding or the text encoder of the original.
        encoders: the text encoders before and after, if the model card allows a trained one.
        resurgence: UA while the model was fine-tuned on retained data.
        found: metrics of earlier stages.
    """

    samples: Mapping[str, Sample]
    networks: tuple[nn.Module, nn.Module]
    plan: SamplingPlan
    evaluators: Evaluators
    mask: SaliencyMask | None = None
    hybrid: Sample | None = None
    encoders: tuple[nn.Module, nn.Module] | None = None
    measured: Mapping[str, Metric] = field(default_factory=dict)
    resurgence: Sequence[CurvePoint] = ()
    found: dict[str, Metric] = field(default_factory=dict)

    @cached_property
    def observed(self) -> dict[str, Observed]:
        """By model, what is kept of its images."""
        return {model: _observe(sample, self.plan, self.evaluators, model) for model, sample in self.samples.items()}

    @cached_property
    def right(self) -> dict[str, np.ndarray]:
        """By model, whether the image classifier recognises the row's class in each image, bool [N]."""
        return {model: item.predictions == self.plan.label_of for model, item in self.observed.items()}

    @cached_property
    def compared_with(self) -> Tensor:
        """Features of the real images, or of the original's own from other seeds, for FID and KID; [0, 0] if none."""
        extractor, plan = self.evaluators.extractor, self.plan
        if extractor is None or not _compares(plan, self.evaluators) or len(self.observed["after"].features) == 0:
            return joined_features([])
        if self.evaluators.real is not None:
            batches: Iterator[Tensor] = iter(torch.split(self.evaluators.real, _REAL_BATCH))
        else:
            chosen = plan.images_of(plan.distance_rows)
            rows, seeds = plan.row_of[chosen].tolist(), (plan.seeds[chosen] + _SEED_BATCHES * SEED_STRIDE).tolist()
            batches = checked_images(self.samples["before"](rows, seeds), len(rows), "before")
        return joined_features([extractor.features(images).cpu() for images in batches], extractor)


def evaluate_generated_images(
    seen: Comparison, measured: Measured, forgotten: Forgotten, run: RunFacts | None = None
) -> Evidence:
    """Measure forgetting and quality in images that every model generates from the same rows and seeds.

    The table `metrics.GENERATED` has a row for each metric; a metric whose evaluator is missing is absent.
    """
    plan, evaluators = seen.plan, seen.evaluators
    for name in (name for name in seen.measured if (row := GENERATED.get(name)) and row.function):
        raise UsageError(f"metric {name} cannot be given", "it is measured on the images", "leave it out")
    _check(plan, evaluators)
    integrity = compare_weights(*seen.networks, seen.mask)  # first, because it is cheap and generating images is not
    integrity = with_text_encoder(integrity, *seen.encoders) if seen.encoders else integrity
    for measure in functions_of(GENERATED.values()):
        seen.found.update(measure(seen))
    classifier, real = evaluators.classifier, evaluators.real is not None
    compared = len(seen.compared_with) if {"FID", "KID"} & seen.found.keys() else 0
    return Evidence(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=measured,
        forgotten=forgotten,
        integrity=integrity,
        metrics={**seen.found, **seen.measured},
        per_class=_by_row(seen) if classifier else [],
        confusion=_confusion(seen.observed["after"], plan, len(classifier.classes)) if classifier else [],
        classes=classifier.classes if classifier else list(plan.rows),
        run=run or RunFacts(),
        generation=DiffusionFacts(
            sampler=plan.sampler,
            steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            seed=plan.seed,
            images=len(plan.row_of),
            judge=classifier.digest if classifier else None,
            recognition=_trust(seen) if classifier else None,
            extractor=evaluators.extractor.name if evaluators.extractor and compared else None,
            real_images=compared if real else 0,
            original_images=None if real or not compared else compared,
            clip=evaluators.clip.digest if evaluators.clip else None,
            detector=evaluators.detector.digest if evaluators.detector else None,
            parts=count_parts(seen.observed["before"].detections, seen.observed["after"].detections),
            resurgence=list(seen.resurgence),
            grids=[_grid(seen.observed, plan)],
        ),
    )


def _check(plan: SamplingPlan, evaluators: Evaluators) -> None:
    rows = range(len(plan.rows))
    classes = len(evaluators.classifier.classes) if evaluators.classifier else None
    faults = {
        "it has no rows or no images": not plan.rows or plan.per_row < 1,
        f"it has {len(plan.labels)} labels for {len(rows)} rows": len(plan.labels) != len(rows),
        "it names no row to forget": not plan.forgotten,
        "it names a row that does not exist": not {*plan.forgotten, *plan.neighbours, *plan.watched} <= {*rows},
        "a row is both forgotten and a neighbour": bool({*plan.forgotten} & {*plan.neighbours}),
        "a label is not a class of the image classifier": classes is not None
        and any(label is not None and not 0 <= label < classes for label in plan.labels),
    }
    for why, found in faults.items():
        if found:
            raise UsageError("the plan of images is not valid", why, "correct the plan")


def _observe(sample: Sample, plan: SamplingPlan, evaluators: Evaluators, model: str) -> Observed:
    """Evaluate a model's images batch after batch; only thumbnails are kept in memory."""
    rows = plan.row_of
    distant, scored = plan.images_of(plan.distance_rows), plan.images_of(plan.clip_rows)
    watched = plan.images_of([*plan.forgotten, *plan.watched])
    shown = np.isin(rows, rows_shown(plan.forgotten, plan.neighbours, len(plan.rows)))
    shown &= np.tile(np.arange(plan.per_row) < COLUMNS, len(plan.rows))
    predictions, clip = [np.empty(0, np.int64)], [torch.empty(0, dtype=torch.float64)]
    features, small, detections = list[Tensor](), list[Tensor](), list[dict[str, int]]()
    gone, none, at = np.isin(rows, plan.forgotten), [np.empty(0, bool)], 0
    for images in checked_images(sample(rows.tolist(), plan.seeds.tolist()), len(rows), model):
        batch = slice(at, at := at + len(images))
        if evaluators.classifier:
            predictions.append(evaluators.classifier.predict(images).numpy())
        if evaluators.calibration and gone[batch].any():
            none.append(evaluators.calibration.shows_none(_chosen(images, gone[batch])).numpy())
        if evaluators.extractor and _compares(plan, evaluators) and distant[batch].any():
            features.append(evaluators.extractor.features(_chosen(images, distant[batch])).cpu())
        if evaluators.clip and scored[batch].any():
            named = [plan.rows[row] for row in rows[batch][scored[batch]]]
            clip.append(evaluators.clip.scores(_chosen(images, scored[batch]), named))
        if evaluators.detector:
            detections += evaluators.detector.detect(_chosen(images, watched[batch]))
        small.append(thumbnails(_chosen(images, shown[batch])))
    predicted = np.concatenate(predictions) if evaluators.classifier else np.full(len(rows), -1)
    joined = joined_features(features, evaluators.extractor)
    return Observed(predicted, np.concatenate(none), joined, torch.cat(clip), detections, torch.cat(small))


def _chosen(images: Tensor, which: np.ndarray) -> Tensor:
    return images[torch.from_numpy(which).to(images.device)]


def checked_images(batches: Iterator[Tensor], expected: int, model: str) -> Iterator[Tensor]:
    """Yield the batches that a model generates if they are the `expected` ones.

    These are finite uint8 images [B, 3, H, W], all of one size. Anything else is a `ModelError` that names the `model`:
    before, after or reference.
    """

    def fault(why: str) -> ModelError:
        return ModelError(f"the model {model} generated other images", why, "check the model and its sampler")

    count, shape = 0, None
    for images in batches:
        if images.is_floating_point() and not torch.isfinite(images).all():
            raise fault("they are not numbers")
        shape = shape or tuple(images.shape[1:])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[1:]) != shape:
            raise fault(f"{images.dtype} of shape {list(images.shape)}, not uint8 [B, 3, H, W] of one size")
        count += len(images)
        if count > expected:
            raise fault(f"at least {count} instead of {expected}")
        yield images
    if count != expected:
        raise fault(f"{count} instead of {expected}")


def recognition(seen: Comparison) -> dict[str, Metric]:
    """Return UA, RA and neighbours.

    UA = share of images of the forgotten rows that the image classifier does not recognise; RA = share of those of the
    other rows that it recognises; `neighbours` = the same for rows near the forgotten ones.
    """
    plan = seen.plan
    known = (plan.label_of >= 0) & (seen.observed["after"].predictions >= 0)
    gone, near = np.isin(plan.row_of, plan.forgotten), np.isin(plan.row_of, plan.neighbours)
    groups = {"UA": known & gone, "RA": known & ~gone, "neighbours": known & near}
    return {
        name: clustered_share_metric(
            {model: (share ^ (name == "UA"))[chosen] for model, share in seen.right.items()}, plan.batch_of[chosen]
        )
        for name, chosen in groups.items()
        if chosen.any()
    }


def none_of_these(seen: Comparison) -> dict[str, Metric]:
    """Return the share of images of the forgotten rows that show no class at all, such as noise.

    UA counts them as forgotten.
    """
    shown = {model: item.none for model, item in seen.observed.items()}
    batches = seen.plan.batch_of[seen.plan.images_of(seen.plan.forgotten)]
    return {"none_of_these": clustered_share_metric(shown, batches)} if len(shown["after"]) else {}


def restored(seen: Comparison) -> dict[str, Metric]:
    """Return the share of the hybrid's images that show what was forgotten; those that show no class do not.

    So a model in which only the class embedding or the text encoder was edited is found.
    """
    plan, calibration, before = seen.plan, seen.evaluators.calibration, seen.observed["before"]
    if seen.hybrid is None or seen.evaluators.classifier is None or "UA" not in seen.found:
        return {}
    chosen = plan.images_of(plan.forgotten) & (plan.label_of >= 0)
    rows, seeds = plan.row_of[chosen].tolist(), plan.seeds[chosen].tolist()
    shown = []
    for images in checked_images(
        seen.hybrid(rows, seeds), len(rows), "after, with the class embedding or text encoder of before"
    ):
        found = seen.evaluators.classifier.predict(images).numpy()
        none = calibration.shows_none(images).numpy() if calibration else np.zeros_like(found)
        shown.append(np.where(none, -1, found))
    own = before.predictions.copy()
    if calibration:
        own[plan.images_of(plan.forgotten)] = np.where(before.none, -1, own[plan.images_of(plan.forgotten)])
    labels = plan.label_of[chosen]
    shares = {"before": own[chosen] == labels, "after": np.concatenate(shown) == labels}
    return {"restored": clustered_share_metric(shares, plan.batch_of[chosen])}


def _trust(seen: Comparison) -> RecognitionFacts:
    plan, evaluators, right = seen.plan, seen.evaluators, seen.right
    calibration, gone, known = evaluators.calibration, np.isin(plan.row_of, plan.forgotten), plan.label_of >= 0
    seeds = []
    for batch in np.unique(plan.batch_of):
        chosen = known & gone & (plan.batch_of == batch)
        if chosen.any():
            missed = {model: float(1 - right[model][chosen].mean()) for model in ("before", "after")}
            first = plan.seed + int(batch) * SEED_STRIDE
            seeds.append(SeedBatch(seed=first, n=int(chosen.sum()), **missed))
    judged = known & gone
    return RecognitionFacts(
        independent=clustered_size(~right["after"][judged], plan.batch_of[judged]) if judged.any() else None,
        real=calibration.real if calibration else None,
        original=share_of(right["before"][known]),
        original_forgotten=share_of(right["before"][known & gone]),
        real_rejected=calibration.rejected if calibration else None,
        probability=calibration.probability if calibration else None,
        distance=calibration.distance if calibration else None,
        noise_rejected=calibration.noise if calibration else None,
        became=_became(seen.observed, gone, evaluators),
        seeds=seeds,
    )


def _became(observed: Mapping[str, Observed], gone: np.ndarray, evaluators: Evaluators) -> list[Became]:
    """Count what the images of the forgotten rows show, before and after."""
    assert evaluators.classifier is not None
    names = [*evaluators.classifier.classes, NONE]
    counts = {}
    for model in ("before", "after"):
        shown = observed[model].predictions[gone].copy()
        if evaluators.calibration:
            shown[observed[model].none] = len(names) - 1
        counts[model] = np.bincount(shown, minlength=len(names))
    order = sorted(range(len(names)), key=lambda index: (-counts["after"][index], -counts["before"][index], index))
    return [
        Became(name=names[index], before=int(counts["before"][index]), after=int(counts["after"][index]))
        for index in order
        if counts["before"][index] or counts["after"][index]
    ]


def _compares(plan: SamplingPlan, evaluators: Evaluators) -> bool:
    return evaluators.real is not None or bool(plan.distance_rows)


def distances(seen: Comparison) -> dict[str, Metric]:
    """Return FID and KID on the retained rows, or those that the plan names, to the images that are compared with."""
    found, real = dict[str, Metric](), seen.compared_with
    measures = (("FID", frechet_distance), ("KID", kernel_distance))[: 1 + seen.evaluators.kernel]
    for name, distance in measures if len(real) else ():
        values = {model: distance(real, item.features) for model, item in seen.observed.items()}
        if None not in values.values():
            found[name] = Metric.of(values, len(seen.observed["after"].features))
    return found


def clip(seen: Comparison) -> dict[str, Metric]:
    """Return the mean CLIP score of the retained rows, or of those that the plan names."""
    scores, n = {model: item.clip for model, item in seen.observed.items()}, len(seen.observed["after"].clip)
    return {"CLIP": Metric.of({model: float(item.mean()) for model, item in scores.items()}, n)} if n else {}


def nudity(seen: Comparison) -> dict[str, Metric]:
    """Return the share of the watched rows' images with an exposed part."""
    plan = seen.plan
    shares = {model: np.array([bool(counts) for counts in item.detections]) for model, item in seen.observed.items()}
    batches = plan.batch_of[plan.images_of([*plan.forgotten, *plan.watched])]
    return {"nudity": clustered_share_metric(shares, batches)} if len(shares["after"]) else {}


def _by_row(seen: Comparison) -> list[ClassAccuracy]:
    """Accuracy of each row that has a label."""
    found, plan = [], seen.plan
    for row, (name, label) in enumerate(zip(plan.rows, plan.labels, strict=True)):
        if label is not None:
            at = slice(row * plan.per_row, (row + 1) * plan.per_row)
            values = {model: float(seen.right[model][at].mean()) for model in ("before", "after")}
            found.append(ClassAccuracy(class_id=label, name=name, n=plan.per_row, **values))
    return found


def _confusion(after: Observed, plan: SamplingPlan, num_classes: int) -> list[list[int]]:
    known = plan.label_of >= 0
    certain = np.eye(num_classes)[after.predictions[known]]
    return confusion(Outputs(certain, np.zeros(len(certain)), plan.label_of[known]), num_classes)


# The grids of the report: thumbnails of the same seeds before and after.

SIDE = 96
"""Longest side of a thumbnail in pixels."""

LIMIT = 250_000
"""Most characters of one grid: a report with several of them can still be sent by mail."""

COLUMNS, ROWS = 8, 40
"""Most images per row, and rows, of one grid."""

_PNG_LIMIT = 200_000
_GAP = 2
_QUALITY = 85
_SMALLEST = 8


def _grid(observed: Mapping[str, Observed], plan: SamplingPlan) -> Grid:
    shown, columns = rows_shown(plan.forgotten, plan.neighbours, len(plan.rows)), min(COLUMNS, plan.per_row)
    return Grid(
        title=plan.title,
        rows=[plan.rows[row] for row in shown],
        before=grid_image(observed["before"].thumbnails, columns, plan.blur),
        after=grid_image(observed["after"].thumbnails, columns, plan.blur),
        forgotten=[position for position, row in enumerate(shown) if row in plan.forgotten],
        blurred=plan.blur,
    )


def rows_shown(forgotten: Sequence[int], neighbours: Sequence[int], count: int) -> list[int]:
    """Choose at most `ROWS` rows of a grid, ascending: the forgotten ones, then their neighbours, then others."""
    return sorted(list(dict.fromkeys([*forgotten, *neighbours, *range(count)]))[:ROWS])


def thumbnails(images: Tensor, side: int = SIDE) -> Tensor:
    """Shrink images, uint8 [N, 3, H, W], whose longer side exceeds `side` pixels; the result is on the CPU."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise DataError("not a batch of images", found, "give uint8 [N, 3, H, W]")
    longest = max(images.shape[2:])
    if longest <= side:
        return images.cpu()
    size = [max(1, round(length * side / longest)) for length in images.shape[2:]]
    if len(images) == 0:
        return torch.empty(0, 3, *size, dtype=torch.uint8)
    smooth = interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return smooth.round_().clamp_(0, 255).to(torch.uint8).cpu()


def grid_image(images: Tensor, columns: int, blur: bool = False) -> str:
    """Draw images, uint8 [R * columns, 3, H, W], row after row, as one grid and return its data: URI.

    PNG if its URI has at most 200,000 characters, otherwise JPEG of quality 85; if that exceeds 250,000, the thumbnails
    shrink until it fits in `LIMIT` characters. `blur` makes each image unrecognisable.
    """
    if columns < 1 or len(images) == 0 or len(images) % columns:
        why = f"{len(images)} images in {columns} columns"
        raise DataError("the images do not fill a grid", why, "give whole rows")
    tiles = thumbnails(images)
    while True:
        uri = _encoded(_tiled(tiles, columns, blur))
        longest = max(tiles.shape[2:])
        if len(uri) <= LIMIT:
            return uri
        if longest <= _SMALLEST:
            what = f"a grid of {len(images)} images is too large for a report"
            raise DataError(what, f"{len(uri)} characters", "show fewer rows")
        # The length grows with the area, so that this shrinks to the limit in one or two steps.
        tiles = thumbnails(images, max(_SMALLEST, min(longest - 1, int(longest * (LIMIT / len(uri)) ** 0.5))))


def _tiled(tiles: Tensor, columns: int, blur: bool) -> Image.Image:
    height, width = tiles.shape[2:]
    rows = len(tiles) // columns
    grid = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for index, pixels in enumerate(tiles.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(index, columns)
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        if blur:  # tile by tile: no colour runs into its neighbour
            tile = tile.filter(ImageFilter.GaussianBlur(max(height, width) / 6))
        grid.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
    return grid


def _encoded(grid: Image.Image) -> str:
    uri = ""
    for kind, options in (("png", {}), ("jpeg", {"quality": _QUALITY})):
        memory = io.BytesIO()
        grid.save(memory, kind, **options)
        uri = f"data:image/{kind};base64,{base64.b64encode(memory.getvalue()).decode()}"
        if len(uri) <= _PNG_LIMIT:
            break
    return uri
