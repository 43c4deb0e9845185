"""Assurance levels: how sure it is that a request was met, for each kind of forget target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from salun_core.config import Document, parse
from salun_core.evaluation.evidence import Evidence
from salun_core.evaluation.statistics import share_power
from salun_core.gate.policy import Level, Policy, Rule
from salun_core.gate.refusal import MORE_IMAGES, Cause, Verdict, check
from salun_core.gate.rules import finite

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_FRESH = 0.1  # least relative distance of a retrained model's weights, also with an equal seed


class LevelWords(NamedTuple):
    """An assurance level in two sentences for the person who answers a request."""

    means: str
    does_not: str


LEVELS: Mapping[Level, LevelWords] = {
    "retrained": LevelWords(
        "The model was trained from fresh weights without this data.",
        "It says nothing about other copies of the model or of the data.",
    ),
    "measured": LevelWords(
        "Enough samples or generated images were measured to show that the model treats this data like data that it "
        "never saw, or no longer generates it, within the limits of the policy.",
        "It does not prove that no trace is left.",
    ),
    "procedure": LevelWords(
        "The recorded procedure was applied, and nothing that was measured contradicts it.",
        "It does not show that the model forgot this data: too few samples or images for that.",
    ),
    "nothing_to_erase": LevelWords(
        "Nothing that the request names was in the training data, so the model was not changed.",
        "It says nothing about data that the request does not name.",
    ),
}
"""What each level means, and what it does not."""


class Assurance(Document):
    """How sure it is that a request was met, and the figures behind it."""

    level: Level = Field(description="assurance level")
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="of the equivalence test: largest distance of the attack's AUC that counts as equal"
    )
    n: Annotated[int, Field(ge=0, le=2**53 - 1, strict=True)] | None = Field(
        default=None, description="samples behind the level, of all requests of the run"
    )
    power: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="probability that so many samples show equivalence if the model is exactly like one that never "
        "saw them; of images, that so many show the rules if none of them shows what was forgotten",
    )
    requests: Annotated[int, Field(ge=1, le=2**53 - 1, strict=True)] | None = Field(
        default=None, description="requests that were measured together; above 1 the evidence is that of the batch"
    )

    @property
    def figures(self) -> str:
        """Level, margin, n and power in one line, and whose evidence it is."""
        parts = [f"margin {self.margin:g}"] if self.margin is not None else []
        parts += [f"n {self.n}"] if self.n is not None else []
        parts += [f"power {self.power:.0%}"] if self.power is not None else []
        parts += [f"evidence of a batch of {self.requests} requests"] if (self.requests or 1) > 1 else []
        return f"{self.level.replace('_', ' ')}{': ' if parts else ''}{', '.join(parts)}"

    @property
    def text(self) -> str:
        """What the level means and what it does not, in one line."""
        return " ".join(LEVELS[self.level])


def assurance_of(decision: Mapping[str, Any], kind: str = "", requests: int | None = None) -> Assurance | None:
    """Return the assurance that a stored decision gives a request.

    Args:
        decision: the gate's decision, as plain JSON.
        kind: of the request's target; the level of this kind counts if the decision has one, otherwise the run's.
        requests: how many requests were measured together.

    Returns:
        The assurance; None for a decision of an earlier release, which has no level.

    Raises:
        UsageError: the decision is damaged.
    """
    names = ("level", "margin", "n", "power")
    found = (decision.get("kinds") or {}).get(kind) or {name: decision.get(name) for name in names}
    return parse(Assurance, {**found, "requests": requests}, "the gate's decision") if found.get("level") else None


def retrained(evidence: Evidence) -> bool:
    """Whether the model was trained from fresh weights; one with nearly its old weights was not, whatever it says."""
    distance = finite(evidence.integrity.distance)
    return evidence.run.method == "retrain" and distance is not None and distance >= _FRESH


def level_of(judged: Sequence[Verdict], evidence: Evidence) -> Level:
    """Return the level of a model whose rules gave these verdicts."""
    if retrained(evidence):
        return "retrained"
    shown = [verdict.shown for verdict in judged if verdict.shown is not None]
    return "measured" if shown and all(shown) else "procedure"


def by_kind(applying: Sequence[Rule], judged: Sequence[Verdict], evidence: Evidence) -> dict[str, Assurance]:
    """Return the assurance of each kind of forget target, by the rules that judge its samples; empty for one kind."""
    forgotten, found = evidence.forgotten, dict[str, Assurance]()
    for kind in forgotten.kinds if len(forgotten.kinds) > 1 else ():
        # A person may be a class of their own, and the evidence does not tell whose samples these are.
        whole = {"class"} if forgotten.in_classes and kind in ("samples", "subject") else set()
        rules = [not rule.targets or {kind, *whole} & set(rule.targets) for rule in applying]
        verdicts = [verdict for verdict, own in zip(judged, rules, strict=True) if own]
        level = level_of(verdicts, evidence)
        found[kind] = Assurance(
            level=level, **certainty([rule for rule, own in zip(applying, rules, strict=True) if own], evidence)
        )
    return found


def allowed(policy: Policy, level: Level, kinds: set[str], *, images: bool = False) -> list[Verdict]:
    """Check that the policy publishes the level for each kind in the forget set; a policy without levels, any level.

    `images`: whether generated images were measured, of which more can be generated.
    """
    wanted = {kind: levels for kind, levels in policy.levels.items() if kind in kinds}
    if not wanted:
        return []
    passed = all(level in levels for levels in wanted.values())
    shown = "; ".join(f"{kind}: {', '.join(levels)}" for kind, levels in wanted.items())
    reason = f"the level is {level}, which the policy does not publish"
    more = MORE_IMAGES if images else "erase more samples in one batch: salun sweep --min-requests N"
    then = f"{more}; or use --method retrain"
    return [check("assurance level", passed, shown, reason, Cause.TOO_FEW_SAMPLES, then)]


def certainty(applying: Sequence[Rule], evidence: Evidence) -> dict[str, Any]:
    """Return margin, n and power of the equivalence test; without one n of the smallest sample, and power of images."""
    shows = [rule for rule in applying if rule.shows and rule.metric in evidence.metrics]
    tests = [rule for rule in shows if rule.op == "inside"]
    found: dict[str, Any] = {"n": min((evidence.metrics[rule.metric].n for rule in shows), default=None)}
    if evidence.generation is not None and not tests:
        powers = [_power_of_images(rule, evidence) for rule in shows if rule.value is not None]
        found["power"] = min(powers, default=None)
    if tests:
        metric, tolerance = evidence.metrics[tests[0].metric], tests[0].tolerance or 0.0
        low, high = finite(metric.low), finite(metric.high)
        found |= {"margin": tolerance, "n": metric.n}
        if low is not None and high is not None and high > low:
            deviation = (high - low) / (2 * _Z95)
            # The interval is inside if the area lies within tolerance - 1.96 deviations of the centre.
            found["power"] = max(0.0, math.erf((tolerance / deviation - _Z95) / math.sqrt(2)))
    return found


def _power_of_images(rule: Rule, evidence: Evidence) -> float:
    """Return the probability that as many images show a rule on a share, if none shows what was forgotten.

    The image classifier is taken to err on such images as often as on real ones, or on the original's if there are no
    real ones, and all its errors count against the model. A detector is taken not to err.
    """
    facts = evidence.generation.recognition if evidence.generation else None
    errors = 0.0
    if facts is not None and rule.metric == "none_of_these":
        errors = facts.real_rejected.value if facts.real_rejected else 0.0
    elif facts is not None and rule.metric == "UA":
        judged = facts.real or facts.original
        errors = 1 - judged.value if judged else 0.0
    above = rule.op == ">="
    n, bound = evidence.metrics[rule.metric].n, rule.value or 0.0
    return share_power(1 - errors if above else errors, n, bound, above=above) if n else 0.0
