"""Refusals: why a rule or a check failed, in words, with figures, and what to do next."""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import Field, model_validator

from salun_core.config import Document
from salun_core.evaluation.evidence import Evidence

MORE_IMAGES = "generate more images: `images_per_class` in the evaluation of the model card"
SEARCH, ANOTHER = "search for a setting that passes: --tune", "use another method, such as --method retrain"


class Cause(StrEnum):
    """Why a rule or a check failed: a closed list."""

    NOT_FORGOTTEN = "not_forgotten"
    OVER_FORGOTTEN = "over_forgotten"
    DAMAGED = "damaged"
    TOO_FEW_SAMPLES = "too_few_samples"
    NOT_MEASURED = "not_measured"
    INTEGRITY = "integrity"

    @property
    def words(self) -> str:
        """The cause in one line."""
        return _CAUSES[self]


_CAUSES = {
    Cause.NOT_FORGOTTEN: "the model still remembers what it had to forget",
    Cause.OVER_FORGOTTEN: "the model forgot more than a model that never saw the data, which reveals them",
    Cause.DAMAGED: "the model lost what it had to keep",
    Cause.TOO_FEW_SAMPLES: "too few samples to show that the rule holds",
    Cause.NOT_MEASURED: "the evidence lacks what the rule needs",
    Cause.INTEGRITY: "the files and the evidence about them do not fit together",
}


class Refusal(Document):
    """Why a rule or a check failed, and what to do; the same text in terminal, report, outcome and pipeline."""

    words: str = Field(description="the rule in words")
    figures: str = Field(description="what was measured, its interval, what is required, and the number of samples")
    cause: Cause = Field(description="why it failed")
    next: str = Field(description="the option or the change that comes next")

    @property
    def text(self) -> str:
        """All but the next step, in one line."""
        return f"{self.words} ({self.figures}). Cause: {self.cause.words} ({self.cause})"


class Verdict(Document):
    """Result of one rule or one built-in check."""

    rule: str
    metric: str | None = None
    threshold: str
    actual: float | None = None
    margin: float | None = Field(default=None, description="distance to the threshold, positive when it holds")
    shown: bool | None = Field(
        default=None,
        description="whether the whole interval satisfies the rule; false if the samples cannot decide it; null for a "
        "rule that judges no interval",
    )
    close: bool = Field(
        default=False,
        description="whether one sample more or less would decide otherwise. Two processors round differently, and so "
        "a model that was trained again elsewhere may be judged otherwise",
    )
    passed: bool
    reason: str
    refusal: Refusal | None = Field(default=None, description="of a failed one")

    @model_validator(mode="after")
    def _reasoned(self) -> Verdict:
        if self.passed != (self.refusal is None):
            raise ValueError("a failed verdict needs a `refusal`, and one that passed has none")
        return self


def check(rule: str, passed: bool, threshold: str, reason: str, cause: Cause, then: str) -> Verdict:
    """Return the verdict of a built-in check, with its refusal if it failed."""
    refusal = None if passed else Refusal(words=reason, figures=f"{rule}: required {threshold}", cause=cause, next=then)
    return Verdict(rule=rule, threshold=threshold, passed=passed, reason="holds" if passed else reason, refusal=refusal)


def strength(evidence: Evidence, *, more: bool) -> str:
    """Return how to unlearn with more or with less strength than the run that the evidence is of."""
    run, way = evidence.run, "more" if more else "less"
    if run.method == "retrain":
        again = (
            "" if evidence.integrity.repeated is not None else "; or repeat it in the evaluation: --retrain-reference"
        )
        return f"retraining cannot be made stronger or gentler: check the forget set and the policy{again}"
    if run.tuning is not None:
        return f"give the search more: --tune-budget (it was {run.tuning.budget}); or --method retrain"
    rate = run.config.get("learning_rate")
    by_hand = f"unlearn with {way} strength"
    adaptive = run.method == "salun_adaptive"
    if adaptive and not more:  # its rounds are as gentle as they could be: a lower first rate changes little
        by_hand = ANOTHER
    elif isinstance(rate, float) and math.isfinite(rate) and rate > 0:
        setting = f"learning_rate={rate * 2 if more else rate / 2:g}"
        by_hand += f", such as --method salun with {setting}" if adaptive else f", such as {setting} (it was {rate:g})"
    tunable = evidence.generation is None and run.method != "unknown"
    return f"{SEARCH}; or {by_hand}" if tunable else by_hand
