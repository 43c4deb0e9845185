"""The evidence document `salun.evidence/v1`: what was measured, on what, and with which uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from salun_core.config import Document
from salun_core.digest import digest_json
from salun_core.errors import UsageError
from salun_core.evaluation.metrics import metric_names
from salun_core.plugins import PluginRecord

EVALUATED = 20_000
"""Most images of D_r, and of the test split, that an evaluation measures unless another number is given."""

EVALUATE_MORE = "measure more images, or all: --evaluation-samples N, or all"
"""What to do if a sample is too small."""

_FEWEST_EVALUATED = 100  # of fewer images, intervals are too wide for any policy


def most_evaluated(text: str) -> int | None:
    """Parse how many images of D_r, and of the test split, an evaluation measures: at least 100, or None for all."""
    if text.strip() in ("all", "0"):
        return None
    if not text.strip().isdecimal() or int(text) < _FEWEST_EVALUATED:
        raise UsageError(
            f"evaluation_samples cannot be {text!r}",
            f"fewer than {_FEWEST_EVALUATED} images show nothing",
            f"give a whole number of at least {_FEWEST_EVALUATED}, or all",
        )
    return int(text)


def _absent(value: object) -> bool:
    """Whether a field is not set, and then not written either."""
    return value is None or value == {}


class Metric(Document):
    """One measured value; null if it could not be measured.

    A ratio from 0 to 1 (`gap` too), except effect (a difference of two areas), change (in typical margins of unseen
    data), FID and KID (distances), CLIP (a score from 0 to 100), and KL and mean losses (nats).
    """

    before: float | None = Field(description="value for the model before unlearning")
    after: float | None = Field(description="value for the model after unlearning")
    reference: float | None = Field(default=None, description="value for the model retrained without the set")
    origin: float | None = Field(
        default=None,
        description="TA only: value for the last full training of the model line; `before` if no line is known",
    )
    n: int = Field(ge=0, description="number of samples behind the value")
    low: float | None = Field(default=None, description="lower end of the 95 % interval of `after`")
    high: float | None = Field(default=None, description="upper end of the 95 % interval of `after`")
    population: int | None = Field(
        default=None,
        ge=1,
        exclude_if=_absent,
        description="images of the split that the n were drawn from; absent if all were measured. With it the "
        "gate judges the end of the interval that is against the model",
    )

    @classmethod
    def of(
        cls,
        values: Mapping[str, float | None],
        n: int,
        interval: tuple[float, float] | tuple[None, None] = (None, None),
    ) -> Metric:
        """Build a metric from values by model.

        Args:
            values: by model: before, after, reference; a missing one is null.
            n: number of samples behind the value.
            interval: 95 % interval of the value after.
        """
        before, after, reference = (values.get(model) for model in ("before", "after", "reference"))
        return cls(before=before, after=after, reference=reference, n=n, low=interval[0], high=interval[1])


class Measured(Document):
    """Digests of everything that the evidence was measured on (SHA-256 in hex)."""

    before: str = Field(description="weights of the model before")
    after: str = Field(description="weights of the model after")
    reference: str | None = Field(default=None, description="weights of the retrained model")
    dataset: str = Field(description="data set: ids, row digests and labels of all samples")
    split: str = Field(description="split manifest")
    forget_set: str = Field(description="resolved forget set")
    mask: str | None = Field(default=None, description="saliency mask, if one was used")


class SampleCount(Document):
    """How many images of a split were measured."""

    n: int = Field(ge=1, description="images that were measured")
    of: int = Field(ge=1, description="images of the split")


class Sampling(Document):
    """The samples that an evaluation measured of splits that are too large to be measured whole.

    Classes are drawn one by one: half of the sample is divided equally, so that a small class is measured whole; the
    rest follows the sizes of the classes. Means are weighted back to the split's own mixture.
    """

    seed: int = Field(
        ge=0, description="of the draw: from the digests of the two models, of the split and of the forget set"
    )
    splits: dict[str, SampleCount] = Field(description="by split: retain, test; a split that is missing was whole")


class KindCount(Document):
    """Samples in the forget set of one kind of forget target; a sample of two kinds counts in both."""

    count: int = Field(ge=0, description="samples of this kind")
    in_classes: int = Field(ge=0, description="those of classes of which nothing is retained")


class Forgotten(Document):
    """What had to be forgotten; it names no sample."""

    count: int = Field(ge=0, description="samples in the forget set")
    train_count: int = Field(ge=0, description="samples in the training split before unlearning")
    kinds: list[str] = Field(description="kinds of forget target in it: samples, class, subject")
    classes: list[int] = Field(
        default=[], description="classes of which nothing is retained, whatever kind of target emptied them"
    )
    in_classes: int | None = Field(
        default=None,
        ge=0,
        exclude_if=_absent,
        description="samples of those classes in the forget set; absent if they were not counted",
    )
    by_kind: dict[str, KindCount] = Field(
        default={}, exclude_if=_absent, description="the same for each kind; absent if they were not counted"
    )

    @property
    def judged_kinds(self) -> set[str]:
        """Kinds of target whose rules apply to some sample."""
        return {found for kind in self.kinds for found in self.rules_of(kind)}

    def rules_of(self, kind: str) -> set[str]:
        """Return the kinds of target whose rules apply to the samples of one kind.

        A person may be a class of their own: if nothing of a class is retained, the rules of classes apply to its
        samples, whatever named them. The rules of single samples apply only if there are samples of other classes. If
        the samples were not counted by kind, both rules apply.
        """
        known = self.by_kind.get(kind) or KindCount(count=self.count, in_classes=self.in_classes or 0)
        if kind not in ("samples", "subject") or not known.in_classes:
            return {kind}
        return {"class"} if known.in_classes >= known.count else {kind, "class"}


class Integrity(Document):
    """Result of comparing the weights before and after bit by bit."""

    weights: int = Field(ge=0, description="parameters of the model")
    weights_changed: int = Field(ge=0, description="parameters whose bits differ")
    frozen_changed: int | None = Field(default=None, description="parameters outside the mask whose bits differ")
    non_finite: int = Field(ge=0, description="parameters and buffers that are NaN or infinite after")
    buffers_changed: int = Field(ge=0, description="buffer values (batch-norm statistics) whose bits differ")
    distance: float | None = Field(
        default=None,
        exclude_if=_absent,
        description="distance of the weight matrices after from the nearest multiples of those before, relative to "
        "their length: 0 for the same up to factors, 1 for unrelated ones; absent if the text encoder changed",
    )
    repeated: bool | None = Field(
        default=None,
        exclude_if=_absent,
        description="whether the evaluation repeated a retraining and came to the same bits; absent if it did not try",
    )


class Series(Document):
    """Histogram counts of one split for each model."""

    before: list[int]
    after: list[int]
    reference: list[int] | None = None


class Distribution(Document):
    """Histograms over common bins; `edges` has one entry more than each series."""

    edges: list[float]
    splits: dict[str, Series] = Field(description="by split: forget, retain, test")


class ClassAccuracy(Document):
    """Accuracy of one class on the test split."""

    class_id: int
    name: str
    before: float | None
    after: float | None
    n: int


class Curve(Document):
    """ROC of the attack that tells forget samples (positive) from unseen ones of the same classes by their margin."""

    fpr: list[float]
    tpr: list[float]
    auc: float


class Reading(Document):
    """What `salun_adaptive` measured after a round, on images that it draws for this; never on test data.

    Shares and areas are ratios, losses are in nats.
    """

    retained: float = Field(description="accuracy on retained images")
    retained_lost: float = Field(default=0.0, description="accuracy on them that was lost beyond noise")
    retained_loss: float = Field(description="mean loss on them")
    unseen: float = Field(description="accuracy on held-out images")
    unseen_lost: float = Field(default=0.0, description="accuracy on them that was lost beyond noise")
    unseen_loss: float = Field(description="mean loss on them")
    area: float | None = Field(
        default=None,
        description="of telling the forget set from held-out images of its classes; null for whole classes",
    )
    change: float | None = Field(default=None, description="mean change of the margins on it, in typical margins")
    recognised: float | None = Field(default=None, description="share of whole classes that is recognised")
    restored: float | None = Field(
        default=None, description="share of them that the last layer of the original recognises; null if not measured"
    )
    finite: bool = Field(default=True, description="whether losses and weights are numbers")
    passes: int = Field(default=0, ge=0, description="of the round and of this measurement")
    kept: bool = Field(default=True, description="false if the round was undone")
    why: str = Field(default="", description="why it was undone")


class EpochRecord(Document):
    """One epoch of the unlearning loop."""

    epoch: int
    learning_rate: float
    losses: dict[str, float] = Field(description="mean loss by phase of the epoch: forget, retain")
    seconds: float
    parts: int = Field(
        default=1, ge=1, description="parts that a batch was divided into because the device had no room for all of it"
    )
    reading: Reading | None = Field(
        default=None, exclude_if=_absent, description="of a method that measures its rounds, its epochs"
    )


class Grid(Document):
    """Images of one model before and after, generated from the same seeds; never images of the data set."""

    title: str = Field(description="what the rows are: classes or prompts")
    rows: list[str] = Field(description="class or prompt of each row of images")
    before: str = Field(description="PNG or JPEG of the whole grid as a data: URI, model before")
    after: str = Field(description="the same seeds, model after")
    forgotten: list[int] = Field(default=[], description="rows that had to be forgotten")
    blurred: bool = Field(default=False, description="whether the images are blurred, as for nudity")


class PartCount(Document):
    """Number of detections of one body part in all images."""

    before: int = Field(ge=0)
    after: int = Field(ge=0)


class CurvePoint(Document):
    """UA after a number of fine-tuning steps on retained data."""

    step: int = Field(ge=0)
    ua: float = Field(description="share of images of the forgotten class that the image classifier does not recognise")


class Share(Document):
    """A share of images with its 95 % interval."""

    value: float = Field(ge=0, le=1, description="as a ratio")
    n: int = Field(ge=1, description="number of images")
    low: float = Field(description="lower end of Wilson's interval")
    high: float = Field(description="upper end of Wilson's interval")


class Became(Document):
    """Number of images of the forgotten rows that the image classifier takes for one class."""

    name: str = Field(description="name of the class, or `none of these`")
    before: int = Field(ge=0)
    after: int = Field(ge=0)


class SeedBatch(Document):
    """UA in the images of one batch of seeds."""

    seed: int = Field(description="of the batch's first image")
    n: int = Field(ge=1, description="images of the forgotten rows")
    before: float = Field(description="UA of the model before")
    after: float = Field(description="UA of the model after")


class RecognitionFacts(Document):
    """How far the image classifier's results on generated images can be trusted."""

    real: Share | None = Field(
        default=None, description="accuracy on real held-out images; null without them, or with too few"
    )
    original: Share | None = Field(default=None, description="accuracy on the images of the model before, of all rows")
    original_forgotten: Share | None = Field(
        default=None, description="accuracy on the images of the model before, of the forgotten rows"
    )
    real_rejected: Share | None = Field(
        default=None, description="real held-out images that count as none of the classes, about 5 % by calibration"
    )
    probability: float | None = Field(
        default=None,
        description="an image below this maximum probability is none of the classes; null if the distance decides",
    )
    distance: float | None = Field(
        default=None,
        description="an image whose features are further than this from the nearest real one is none of the "
        "classes; null for an image classifier without features",
    )
    noise_rejected: float | None = Field(
        default=None,
        description="share of noise that counts as none of the classes, of uniform, normal and plain grey images the "
        "smallest; null if the probability decides",
    )
    became: list[Became] = Field(default=[], description="what the forgotten rows show, the most frequent first")
    seeds: list[SeedBatch] = Field(default=[], description="UA by batch of seeds")
    independent: float | None = Field(
        default=None,
        description="independent images that those behind UA are worth, for its interval: fewer than n if the batches "
        "of seeds differ by more than chance",
    )


class DiffusionFacts(Document):
    """How a diffusion model's images were generated and evaluated."""

    task: Literal["class-conditional", "text-to-image"] = Field(
        default="text-to-image", description="what the model is conditioned on"
    )
    sampler: str = Field(description="class of the sampler")
    steps: int = Field(ge=1, description="denoising steps per image")
    guidance_scale: float = Field(description="classifier-free guidance; 1 is none")
    seed: int = Field(description="of the first image; each image has its own, the same for every model")
    images: int = Field(ge=0, description="generated by each model")
    judge: str | None = Field(default=None, description="digest of the image classifier")
    extractor: str | None = Field(
        default=None, description="whose features FID and KID compare: `judge:<digest>` or `inception:<digest>`"
    )
    recognition: RecognitionFacts | None = Field(
        default=None, exclude_if=_absent, description="of the image classifier; absent without one"
    )
    real_images: int = Field(default=0, ge=0, description="real images that FID and KID compare with")
    original_images: int | None = Field(
        default=None,
        exclude_if=_absent,
        description="images of the original model from other seeds: FID and KID compare with them without data",
    )
    clip: str | None = Field(default=None, description="digest of the CLIP model behind the CLIP score")
    detector: str | None = Field(default=None, description="digest of the nudity detector")
    parts: dict[str, PartCount] = Field(default={}, description="nudity detections by body part")
    resurgence: list[CurvePoint] = Field(default=[], description="UA while the model is fine-tuned on retained data")
    grids: list[Grid] = Field(default=[], description="the same seeds before and after")


class RelearnPoint(Document):
    """Accuracy on one half of the forget set after a number of training steps on the other half."""

    step: int = Field(ge=0)
    accuracy: float = Field(description="as a ratio")


class OptionalMetricFacts(Document):
    """How the optional metrics were measured."""

    asked: list[str] = Field(description="names of the optional metrics that were requested")
    shadow_models: int = Field(default=0, ge=0, description="lira: models trained for the attack")
    unseen: int = Field(default=0, ge=0, description="lira: test images that the attack tells the forget set from")
    relearning: dict[str, list[RelearnPoint]] = Field(default={}, description="by model: before, after, reference")
    seeds: list[int] = Field(default=[], description="seeds of the repeated unlearning, the model's own first")
    seconds: float = Field(ge=0, description="wall clock of all of them")


class TuningFacts(Document):
    """Cost and choice of a hyperparameter search."""

    trials: int = Field(ge=1, description="configurations that were tried")
    budget: str = Field(description="as it was given: passes, seconds or epochs")
    passes: int = Field(ge=0, description="sample passes of the whole search, its measurements included")
    seconds: float = Field(ge=0, description="wall clock of the whole search")
    policy_digest: str = Field(description="of the policy whose margins bound the search")
    mask: str | None = Field(default=None, description="digest of the mask that the search computed and used")
    method: str | None = Field(
        default=None,
        exclude_if=_absent,
        description="auto, or several methods: what the search chose from; absent: it had one method",
    )


class RunFacts(Document):
    """How the model after was produced; empty for a model from elsewhere."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    method: str = "unknown"
    config: dict[str, object] = Field(default={}, description="the method's resolved configuration")
    seed: int | None = None
    density: float | None = Field(default=None, description="share of salient weights in the mask")
    density_by_parameter: dict[str, float] = Field(default={}, description="the same by parameter")
    seconds: dict[str, float] = Field(default={}, description="wall-clock seconds by step: mask, unlearn, reference")
    passes: int | None = Field(default=None, description="sample passes forward and backward, mask and tuning included")
    history: list[EpochRecord] = []
    environment: dict[str, str] = Field(default={}, description="versions, device, processor threads")
    tuning: TuningFacts | None = Field(
        default=None, exclude_if=_absent, description="of a run whose configuration was searched for"
    )
    changed_fraction: float | None = Field(
        default=None,
        alias="moved",  # the stored key
        ge=0,
        le=1,
        exclude_if=_absent,
        description="fraction of weights whose value the run changed; absent if it was not measured",
    )
    plugins: list[PluginRecord] | None = Field(
        default=None,
        exclude_if=_absent,
        description="plug-ins that made the model after: method and architecture; absent without any",
    )
    ended: str | None = Field(
        default=None,
        exclude_if=_absent,
        description="what ended it, of a method that measures its rounds: forgotten, budget, exhausted",
    )


class Evidence(Document):
    """Everything that the gate, the report and an auditor need of one evaluation."""

    format: Literal["salun.evidence/v1"] = "salun.evidence/v1"
    created_at: str = Field(description="ISO 8601 in UTC")
    measured: Measured
    forgotten: Forgotten
    integrity: Integrity
    metrics: dict[str, Metric] = Field(description="by name: " + ", ".join(metric_names()))
    distributions: dict[str, Distribution] = Field(default={}, description="by quantity: loss, confidence")
    per_class: list[ClassAccuracy] = []
    roc: dict[str, Curve] = Field(default={}, description="by model: before, after, reference")
    confusion: list[list[int]] = Field(default=[], description="test split, model after: rows true, columns predicted")
    classes: list[str] = []
    run: RunFacts = RunFacts()
    generation: DiffusionFacts | None = Field(
        default=None, exclude_if=_absent, description="of a diffusion model: how it was evaluated"
    )
    further: OptionalMetricFacts | None = Field(
        default=None, exclude_if=_absent, description="optional metrics, if any were requested"
    )
    plugins: list[PluginRecord] | None = Field(
        default=None,
        exclude_if=_absent,
        description="plug-ins that measured: metrics, attacks and the architecture; absent without any",
    )
    sampling: Sampling | None = Field(
        default=None, exclude_if=_absent, description="of a classifier: samples of large splits; absent without any"
    )

    @property
    def all_plugins(self) -> list[PluginRecord]:
        """The plug-ins that made the model or measured it, each once; another digest is another plug-in."""
        found = {record.model_dump_json(): record for record in (*(self.run.plugins or ()), *(self.plugins or ()))}
        return [found[text] for text in sorted(found)]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON; a NaN or an infinity counts as null."""
        return digest_json(_without_nan(self.model_dump(mode="json")))


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value
