"""The evidence document: what was measured, on what, and how sure it is. JSON, `salun.evidence/v1`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from salun_core.config import Document


class Metric(Document):
    """One measured share, a ratio from 0 to 1 (`gap` too); null where it could not be measured."""

    before: float | None = Field(description="value for the model before unlearning")
    after: float | None = Field(description="value for the model after unlearning")
    reference: float | None = Field(default=None, description="value for the model retrained without the set")
    origin: float | None = Field(
        default=None,
        description="TA only: value for the last full training of the model line; `before` where no line is known",
    )
    n: int = Field(ge=0, description="number of samples behind the value")
    low: float | None = Field(default=None, description="lower end of the 95 % interval of `after`")
    high: float | None = Field(default=None, description="upper end of the 95 % interval of `after`")


class Measured(Document):
    """Digests of everything that the evidence was measured on (SHA-256 in hex)."""

    before: str = Field(description="weights of the model before")
    after: str = Field(description="weights of the model after")
    reference: str | None = Field(default=None, description="weights of the retrained model")
    dataset: str = Field(description="data set: ids, row digests and labels of all samples")
    split: str = Field(description="split manifest")
    forget_set: str = Field(description="resolved forget set")
    mask: str | None = Field(default=None, description="saliency mask, where one was used")


class Forgotten(Document):
    """What was asked to be forgotten, without naming a sample."""

    count: int = Field(ge=0, description="samples in the forget set")
    train_count: int = Field(ge=0, description="samples in the training split before unlearning")
    kinds: list[str] = Field(description="kinds of forget target in it: samples, class, subject")
    classes: list[int] = Field(default=[], description="classes that are forgotten as a whole")


class Integrity(Document):
    """What comparing the two sets of weights bit by bit gave."""

    weights: int = Field(ge=0, description="parameters of the model")
    weights_changed: int = Field(ge=0, description="parameters whose bits differ")
    frozen_changed: int | None = Field(default=None, description="parameters outside the mask whose bits differ")
    non_finite: int = Field(ge=0, description="parameters and buffers that are NaN or infinite after")
    buffers_changed: int = Field(ge=0, description="buffer values (batch-norm statistics) whose bits differ")


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
    """ROC of the attack that tells forget samples (positive) from test samples by their loss."""

    fpr: list[float]
    tpr: list[float]
    auc: float


class EpochRecord(Document):
    """One epoch of the unlearning loop."""

    epoch: int
    learning_rate: float
    losses: dict[str, float] = Field(description="mean loss by part of the epoch: forget, retain")
    seconds: float


class RunFacts(Document):
    """How the model after was made; empty for a model that came from elsewhere."""

    method: str = "unknown"
    config: dict[str, object] = Field(default={}, description="the method's resolved configuration")
    seed: int | None = None
    density: float | None = Field(default=None, description="share of salient weights in the mask")
    density_by_parameter: dict[str, float] = Field(default={}, description="the same by parameter")
    seconds: dict[str, float] = Field(default={}, description="wall-clock seconds by step: mask, unlearn, reference")
    passes: int | None = Field(default=None, description="sample passes forward and backward, mask included")
    history: list[EpochRecord] = []
    environment: dict[str, str] = Field(default={}, description="versions, device, processor threads")


class Evidence(Document):
    """Everything that the gate, the report and an auditor need of one evaluation."""

    format: Literal["salun.evidence/v1"] = "salun.evidence/v1"
    created_at: str = Field(description="ISO 8601 in UTC")
    measured: Measured
    forgotten: Forgotten
    integrity: Integrity
    metrics: dict[str, Metric] = Field(
        description="by name: UA (of it UA_class, UA_samples), RA, TA, MIA, MIA_entropy, attack_auc, gap"
    )
    distributions: dict[str, Distribution] = Field(default={}, description="by quantity: loss, confidence")
    per_class: list[ClassAccuracy] = []
    roc: dict[str, Curve] = Field(default={}, description="by model: before, after, reference")
    confusion: list[list[int]] = Field(default=[], description="test split, model after: rows true, columns predicted")
    classes: list[str] = []
    run: RunFacts = RunFacts()
