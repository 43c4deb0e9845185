"""Assurance levels: how sure it is that a request was met, for each kind of forget target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from salun_core.config import Document
from salun_core.evaluation.evidence import Evidence
from salun_core.gate.policy import Level, Policy, Rule
from salun_core.gate.refusal import MORE_IMAGES, Cause, Verdict, check
from salun_core.gate.rules import apply, finite, threshold_of

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_FRESH = 0.7  # trainings from other first weights are 0.99 and more apart; noise of this size destroys a model
_UNFAMILIAR = Rule(
    metric="attack_auc",
    op="inside",
    value=0.5,
    tolerance=0.1,
    or_reference=True,
    reason="a retrained model must not be more familiar with the forgotten data than with unseen data",
)
_OTHER_ANSWERS = Rule(
    metric="change",
    op=">=",
    value=0.03,
    reason="a model that was trained from fresh weights must answer differently from the one before",
)


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


def claimed(policy: Policy, evidence: Evidence) -> list[Verdict]:
    """Check the claim of a run that it retrained, which frees a model of rules and is written by the run itself.

    Either the evaluation repeated the training and came to the same bits, or nothing that it measured contradicts the
    claim: the weights do not continue those before, the outputs are others, and the lower end of the attack's interval
    is within the margin of unseen data, or of a reference. Being less familiar is no contradiction, because a model
    that never saw the data can find them harder than other data. The policy's equivalence test of the attack sets the
    margin; without one it is 0.1.

    Returns one verdict if the training was repeated, otherwise three, or one for a model that draws images; none for
    another method.
    """
    if evidence.run.method != "retrain":
        return []
    if evidence.integrity.repeated:
        return [check("retrained again", True, "the same bits", "", Cause.INTEGRITY, "")]
    distance = finite(evidence.integrity.distance)
    fresh = distance is not None and distance >= _FRESH
    found = "unknown" if distance is None else f"{distance:.4f}"
    continued = f"the run claims a retraining, but its weights continue those before: distance {found}"
    then = "let the evaluation retrain as well and compare: --retrain-reference; or retrain with another seed: --seed"
    verdicts = [check("fresh weights", fresh, f"a distance of {_FRESH:g}", continued, Cause.INTEGRITY, then)]
    if evidence.generation is None:  # no attack is measured on a model that draws images
        tests = [rule for rule in policy.rules if (rule.metric, rule.op) == (_UNFAMILIAR.metric, "inside")]
        verdicts += [_not_more_familiar(tests[0] if tests else _UNFAMILIAR, evidence), apply(_OTHER_ANSWERS, evidence)]
    return verdicts


def _not_more_familiar(test: Rule, evidence: Evidence) -> Verdict:
    """Judge the upper side alone of an equivalence test: that the interval begins below its upper bound."""
    centre = threshold_of(test, evidence)
    bound = (0.5 if centre is None else centre) + (test.tolerance or 0.0)
    return apply(Rule(metric=test.metric, op="<=", value=bound, judge="low", reason=_UNFAMILIAR.reason), evidence)


def level_of(judged: Sequence[Verdict], retrained: bool) -> Level:
    """Return the level of a model whose rules gave these verdicts, and whose retraining is shown or not."""
    if retrained:
        return "retrained"
    shown = [verdict.shown for verdict in judged if verdict.shown is not None]
    return "measured" if shown and all(shown) else "procedure"


def by_kind(
    applying: Sequence[Rule], judged: Sequence[Verdict], evidence: Evidence, retrained: bool
) -> dict[str, Assurance]:
    """Return the assurance of each kind of forget target, by the rules that judge its samples."""
    found = dict[str, Assurance]()
    for kind in evidence.forgotten.kinds:
        kinds = evidence.forgotten.rules_of(kind)
        own = [
            (rule, verdict)
            for rule, verdict in zip(applying, judged, strict=True)
            if not rule.targets or kinds & set(rule.targets)
        ]
        level = level_of([verdict for _, verdict in own], retrained)
        found[kind] = Assurance(level=level, **certainty([rule for rule, _ in own], evidence))
    return found


def allowed(policy: Policy, levels: Mapping[str, Assurance], evidence: Evidence) -> list[Verdict]:
    """Check that the policy publishes the level of each kind in the forget set; a policy without levels, any level.

    A person who is a class must have a level that is published for persons and for classes.
    """
    ruled = [(kind, rules) for kind in levels for rules in sorted({kind, *evidence.forgotten.rules_of(kind)})]
    wanted = [(kind, published) for kind, rules in ruled for name, published in policy.levels.items() if name == rules]
    if not wanted:
        return []
    other = {kind: levels[kind].figures for kind, published in wanted if levels[kind].level not in published}
    shown = "; ".join(f"{kind}: {', '.join(published)}" for kind, published in wanted)
    found = ", and ".join(f"the level of {kind} is {figures}" for kind, figures in other.items())
    more = MORE_IMAGES if evidence.generation else "erase more samples in one batch: salun sweep --min-requests N"
    then = f"{more}; or use --method retrain"
    reason = f"{found}, which the policy does not publish"
    return [check("assurance level", not other, shown, reason, Cause.TOO_FEW_SAMPLES, then)]


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
    from salun_core.evaluation.statistics import share_power  # on first use: numpy takes 0.1 s to import

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
