"""The gate: policy + evidence -> decision with a verdict per rule. It fails closed.

Some checks are enforced under every policy: the digests are the expected ones, the forget set is not empty,
the model changed, its weights are finite, and the weights outside the mask kept their bits.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from salun_core.config import Document, load, parse, parse_text
from salun_core.digest import digest_json
from salun_core.errors import GateRefusedError, unknown_name
from salun_core.evaluation.evidence import EXTRA_METRIC_OF, METRIC_NAMES, MORE_IS_FORGOTTEN, Evidence, Metric

State = Literal["before", "after", "reference", "origin"]
Kind = Literal["samples", "class", "subject", "concept"]
Level = Literal["retrained", "measured", "procedure", "nothing_to_erase"]
_SUMMARY_CHARACTERS = 420  # an outcome takes 500, with what comes before and after
_TOLERANCE = 1e-12  # of comparisons: 0.9 - 0.02 in binary is not 0.88
_ENDS = {"value": "after", "low": "low", "high": "high"}
_MARGINS: dict[str, Callable[[float, float, float], float]] = {
    "<=": lambda actual, threshold, _: threshold - actual,
    ">=": lambda actual, threshold, _: actual - threshold,
    "within": lambda actual, threshold, tolerance: tolerance - abs(actual - threshold),
    "inside": lambda actual, threshold, tolerance: tolerance - abs(actual - threshold),
}
_ADVERSE = {"<=": "high", ">=": "low"}  # end of the interval that speaks against a rule: if it holds, the rule is shown
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_FRESH = 0.1  # least relative distance of a retrained model's weights, also with an equal seed


class Relative(Document):
    """A threshold computed from the evidence: `scale * metric.state + offset`."""

    metric: str = Field(description="metric to take the threshold from")
    state: State = Field(
        default="before", description="model it was measured on; `origin`: the last full training of the line"
    )
    scale: float = Field(default=1.0, allow_inf_nan=False, description="factor")
    offset: float = Field(default=0.0, allow_inf_nan=False, description="added to the product, as a ratio")


class Rule(Document):
    """One condition on the model after unlearning."""

    metric: str = Field(description="name of a metric in the evidence")
    op: Literal["<=", ">=", "within", "inside"] = Field(
        description="`within`: |metric - threshold| <= tolerance; `inside`: both ends of the 95 % interval are within, "
        "which is an equivalence test"
    )
    value: float | None = Field(default=None, allow_inf_nan=False, description="fixed threshold, as a ratio")
    relative_to: Relative | None = Field(default=None, description="threshold computed from the evidence")
    tolerance: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="for `within` and `inside`")
    or_reference: bool = Field(
        default=False, description="for `inside`: compare with the retrained model's value if the evidence has one"
    )
    judge: Literal["value", "low", "high"] = Field(
        default="value", description="compare the value after, or an end of its 95 % interval"
    )
    undecided: Literal["refuse", "procedure"] = Field(
        default="refuse",
        description="what follows if a part of the interval satisfies the rule: refuse, or the level `procedure`",
    )
    unless_retrained: bool = Field(
        default=False,
        description="leave the rule out for a model that was retrained from fresh weights, which is exact",
    )
    targets: list[Kind] = Field(default=[], description="forget targets that the rule applies to; empty: all")
    min_n: int = Field(default=1, ge=1, description="minimum number of samples behind the metric")
    reason: str = Field(min_length=1, description="why the rule exists, for the report")

    @model_validator(mode="after")
    def _one_threshold(self) -> Rule:
        if (self.value is None) == (self.relative_to is None):
            raise ValueError("give exactly one of `value` and `relative_to`")
        if (self.op in ("within", "inside")) != (self.tolerance is not None):
            raise ValueError("`within` and `inside` need a `tolerance`, and no other operator takes one")
        if self.op == "inside" and self.judge != "value":
            raise ValueError("`inside` judges both ends: leave `judge` out")
        if self.or_reference and self.op != "inside":
            raise ValueError("`or_reference` is for `inside`")
        if self.undecided == "procedure" and not self.shows:
            raise ValueError("`undecided` needs `inside`, `<=` with `judge: high`, or `>=` with `judge: low`")
        return self

    @property
    def shows(self) -> bool:
        """Whether the rule holds only if the whole interval satisfies it."""
        return self.op == "inside" or _ADVERSE.get(self.op) == self.judge


class Policy(Document):
    """A named list of rules; all that apply must hold."""

    format: Literal["salun.policy/v1"] = "salun.policy/v1"
    name: str = Field(min_length=1)
    levels: dict[Kind, list[Level]] = Field(
        default={}, description="assurance levels that may be published, by kind of forget target; any if left out"
    )
    rules: list[Rule] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON; fields that later versions added count only if they are set."""
        document = self.model_dump(mode="json")
        if not self.levels:
            del document["levels"]
        for rule in document["rules"]:
            for name, default in (("or_reference", False), ("undecided", "refuse"), ("unless_retrained", False)):
                if rule[name] == default:
                    del rule[name]
        return digest_json(document)


class Expected(Document):
    """Digests that the publisher computed itself; each given one must equal the evidence's."""

    before: str | None = None
    after: str | None = None
    split: str | None = None
    dataset: str | None = None
    forget_set: str | None = None
    mask: str | None = None


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


_STRENGTH = {Cause.NOT_FORGOTTEN, Cause.OVER_FORGOTTEN, Cause.DAMAGED}
_SEARCH, _ANOTHER = "search for a setting that passes: --tune", "use another method, such as --method retrain"


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
    passed: bool
    reason: str
    refusal: Refusal | None = Field(default=None, description="of a failed one; earlier releases wrote none")


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
        "Enough samples were measured to show that the model treats this data like data that it never saw, within the "
        "limits of the policy.",
        "It does not prove that no trace is left.",
    ),
    "procedure": LevelWords(
        "The recorded procedure was applied, and nothing that was measured contradicts it.",
        "It does not show that the model forgot this data: too few samples for that.",
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
        "saw them",
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


class GateDecision(Document):
    """The gate's decision, stored with the version."""

    format: Literal["salun.decision/v1"] = "salun.decision/v1"
    passed: bool
    policy: str
    policy_digest: str
    evidence_digest: str
    summary: str
    level: Level | None = Field(
        default=None,
        description="assurance: `retrained` (exact), `measured` (every rule on an interval is shown), `procedure` "
        "(nothing contradicts the recorded procedure, and the samples cannot decide more); null if refused",
    )
    margin: float | None = Field(
        default=None, description="of the equivalence test: largest distance of the attack's AUC that counts as equal"
    )
    n: int | None = Field(default=None, description="forgotten samples behind the level")
    power: float | None = Field(
        default=None,
        description="probability that so many samples show equivalence if the model is exactly like one that never "
        "saw them",
    )
    kinds: dict[str, Assurance] = Field(
        default={}, description="level of each kind of forget target, of a forget set of several kinds that passed"
    )
    verdicts: list[Verdict]

    @property
    def refusals(self) -> list[Refusal]:
        """Why each failed rule failed; empty for a decision of an earlier release."""
        return [verdict.refusal for verdict in self.verdicts if verdict.refusal]

    @property
    def next(self) -> str:
        """What to do after a refusal; empty if the gate passed."""
        strengths = {refusal.cause: refusal.next for refusal in self.refusals if refusal.cause in _STRENGTH}
        if len(set(strengths.values())) > 1:  # more strength and less at once
            tunable = any(refusal.next.startswith(_SEARCH) for refusal in self.refusals)
            return f"{_SEARCH}; or {_ANOTHER}" if tunable else _ANOTHER
        return "; ".join(dict.fromkeys(refusal.next for refusal in self.refusals))

    def require(self, where: str = "") -> None:
        """Raise unless the gate passed.

        Args:
            where: path or address of the file with the decision, for the message.

        Raises:
            GateRefusedError: with the reasons of all failed verdicts, and what to do.
        """
        if not self.passed:
            steps = [self.next, f"the decision is in {where}" if where else "", "nothing was published"]
            raise GateRefusedError("the gate refused the model", self.summary, "; ".join(filter(None, steps)))


def shipped_policies() -> list[str]:
    """Return the names of the policies that ship."""
    return sorted(_shipped())


def _shipped() -> dict[str, Traversable]:
    folder = importlib.resources.files("salun_core") / "policies"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def load_policy(source: str | Path) -> Policy:
    """Read a shipped policy by its name (`classifier`), or a policy from a file.

    Raises:
        UsageError: the policy does not exist, or the file has faults (all are listed).
    """
    names = _shipped()
    if str(source) in names:
        text = names[str(source)].read_text(encoding="utf-8")
        return parse(Policy, parse_text(text, f"policy {source}"), f"policy {source}")
    if "/" not in str(source) and "." not in str(source):
        raise unknown_name("policy", str(source), names)
    return load(Policy, Path(source))


def default_policy(evidence: Evidence) -> str:
    """Return the name of the shipped policy for the kind of model that the evidence describes."""
    generation = evidence.generation
    return "classifier" if generation is None else policy_of_images(generation.task, bool(generation.detector))


def policy_of_images(task: str, nudity: bool) -> str:
    """Return the name of the shipped policy of a diffusion model.

    Args:
        task: class-conditional or text-to-image.
        nudity: whether its images are searched for nudity.
    """
    if task == "class-conditional":
        return "ddpm"
    return "nsfw" if nudity else "stable-diffusion"


def decide(evidence: Evidence, policy: Policy, expected: Expected | None = None) -> GateDecision:
    """Apply a policy to evidence.

    Args:
        evidence: what was measured.
        policy: the rules; a rule whose `targets` name none of the forget set's kinds is left out.
        expected: digests that the caller computed itself from the artifacts at hand.

    Returns:
        The decision. It passes only if all built-in checks and all rules that apply pass, at least one rule applies,
        and a policy with rules for single kinds covers every kind of forget target in the set.
    """
    kinds = evidence.forgotten.judged_kinds
    of_kinds = [rule for rule in policy.rules if not rule.targets or kinds & set(rule.targets)]
    applying = [rule for rule in of_kinds if not (rule.unless_retrained and _retrained(evidence))]
    judged = [_apply(rule, evidence) for rule in applying]
    level = _level(judged, evidence)
    verdicts = [
        *_builtin(evidence, expected or Expected()),
        _covers(policy, applying, kinds),
        *_allowed(policy, level, kinds),
        *judged,
    ]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return GateDecision(
        passed=not failed,
        policy=policy.name,
        policy_digest=policy.digest,
        evidence_digest=evidence.digest,
        summary=_summary(failed) or f"all {len(verdicts)} checks hold",
        level=None if failed else level,
        **_certainty(applying, evidence),
        kinds={} if failed else _by_kind(applying, judged, evidence),
        verdicts=verdicts,
    )


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


def _retrained(evidence: Evidence) -> bool:
    """Whether the model was trained from fresh weights; one with nearly its old weights was not, whatever it says."""
    distance = _finite(evidence.integrity.distance)
    return evidence.run.method == "retrain" and distance is not None and distance >= _FRESH


def _level(judged: Sequence[Verdict], evidence: Evidence) -> Level:
    if _retrained(evidence):
        return "retrained"
    shown = [verdict.shown for verdict in judged if verdict.shown is not None]
    return "measured" if shown and all(shown) else "procedure"


def _by_kind(applying: Sequence[Rule], judged: Sequence[Verdict], evidence: Evidence) -> dict[str, Assurance]:
    """Return the assurance of each kind of forget target, by the rules that judge its samples; empty for one kind."""
    forgotten, found = evidence.forgotten, dict[str, Assurance]()
    for kind in forgotten.kinds if len(forgotten.kinds) > 1 else ():
        # A person may be a class of their own, and the evidence does not tell whose samples these are.
        whole = {"class"} if forgotten.in_classes and kind in ("samples", "subject") else set()
        rules = [not rule.targets or {kind, *whole} & set(rule.targets) for rule in applying]
        verdicts = [verdict for verdict, own in zip(judged, rules, strict=True) if own]
        level = _level(verdicts, evidence)
        found[kind] = Assurance(
            level=level, **_certainty([rule for rule, own in zip(applying, rules, strict=True) if own], evidence)
        )
    return found


def _allowed(policy: Policy, level: Level, kinds: set[str]) -> list[Verdict]:
    """Check that the policy publishes the level for each kind in the forget set; a policy without levels, any level."""
    wanted = {kind: levels for kind, levels in policy.levels.items() if kind in kinds}
    if not wanted:
        return []
    passed = all(level in levels for levels in wanted.values())
    shown = "; ".join(f"{kind}: {', '.join(levels)}" for kind, levels in wanted.items())
    reason = f"the level is {level}, which the policy does not publish"
    then = "erase more samples in one batch: salun sweep --min-requests N; or use --method retrain"
    return [_check("assurance level", passed, shown, reason, Cause.TOO_FEW_SAMPLES, then)]


def _certainty(applying: Sequence[Rule], evidence: Evidence) -> dict[str, Any]:
    """Return margin, n and power of the equivalence test; n alone, of the smallest sample, without such a test."""
    shows = [rule for rule in applying if rule.shows and rule.metric in evidence.metrics]
    tests = [rule for rule in shows if rule.op == "inside"]
    found: dict[str, Any] = {"n": min((evidence.metrics[rule.metric].n for rule in shows), default=None)}
    if tests:
        metric, tolerance = evidence.metrics[tests[0].metric], tests[0].tolerance or 0.0
        low, high = _finite(metric.low), _finite(metric.high)
        found |= {"margin": tolerance, "n": metric.n}
        if low is not None and high is not None and high > low:
            deviation = (high - low) / (2 * _Z95)
            # The interval is inside if the area lies within tolerance - 1.96 deviations of the centre.
            found["power"] = max(0.0, math.erf((tolerance / deviation - _Z95) / math.sqrt(2)))
    return found


def _summary(failed: Sequence[Verdict]) -> str:
    """Return the failed rules in one line that has room in an outcome and an error."""
    lines = [f"{item.refusal.words} ({item.refusal.figures}; {item.refusal.cause})" for item in failed if item.refusal]
    shown = lines[:1]
    while len(shown) < len(lines) and len("; ".join([*shown, lines[len(shown)]])) <= _SUMMARY_CHARACTERS:
        shown.append(lines[len(shown)])
    more = len(lines) - len(shown)
    return "; ".join([*shown, *([f"and {more} more failed checks"] if more else [])])


def digest_of(evidence: Evidence) -> str:
    """Return the SHA-256 of the evidence's canonical JSON, as a decision names it."""
    return evidence.digest


def _builtin(evidence: Evidence, expected: Expected) -> list[Verdict]:
    measured, integrity, forgotten = evidence.measured, evidence.integrity, evidence.forgotten
    verdicts = []
    for name, digest in expected.model_dump(exclude_none=True).items():
        thing = name.replace("_", " ")
        then = f"evaluate again with the {thing} at hand: salun evaluate --help"
        same = getattr(measured, name) == digest
        other = f"the evidence was measured on another {thing}"
        verdicts.append(_check(f"{name} digest", same, digest[:12], other, Cause.INTEGRITY, then))
    part = 0 < forgotten.count < forgotten.train_count
    changed = measured.before != measured.after and integrity.weights_changed > 0
    frozen = integrity.frozen_changed == 0 if measured.mask else integrity.frozen_changed in (None, 0)
    empty = "the forget set is empty or is the whole training split"
    others = "name samples that were trained on, and not all of them"
    outside = "weights outside the mask changed, or were not compared"
    with_mask = "evaluate again with the mask that the run used: salun evaluate --mask"
    more, less = _strength(evidence, more=True), _strength(evidence, more=False)
    finite, nan = integrity.non_finite == 0, "the weights contain NaN or infinity"
    return [
        *verdicts,
        _check("forget set", part, "not empty, not all data", empty, Cause.INTEGRITY, others),
        _check("model changed", changed, "> 0 weights", "the model did not change", Cause.NOT_FORGOTTEN, more),
        _check("weights finite", finite, "0 non-finite", nan, Cause.DAMAGED, less),
        _check("frozen weights", frozen, "0 changed", outside, Cause.INTEGRITY, with_mask),
    ]


def _covers(policy: Policy, applying: Sequence[Rule], kinds: set[str]) -> Verdict:
    """Check that a rule applies, and that a policy with rules for single kinds has some for each kind in the set."""
    named = {target for rule in policy.rules for target in rule.targets}
    covered = bool(applying) and bool(kinds) and (not named or kinds <= named)
    reason = "the policy does not cover the forget set's kind"
    then = f"choose a policy with rules for {' and '.join(sorted(kinds)) or 'the forget target'}: --policy FILE"
    return _check("a rule applies", covered, f"{len(applying)} rules", reason, Cause.NOT_MEASURED, then)


def _check(rule: str, passed: bool, threshold: str, reason: str, cause: Cause, then: str) -> Verdict:
    refusal = None if passed else Refusal(words=reason, figures=f"{rule}: required {threshold}", cause=cause, next=then)
    return Verdict(rule=rule, threshold=threshold, passed=passed, reason="holds" if passed else reason, refusal=refusal)


def _apply(rule: Rule, evidence: Evidence) -> Verdict:
    name = f"{rule.metric} {rule.op}" + (f" ({rule.judge} end)" if rule.judge != "value" else "")
    metric = evidence.metrics.get(rule.metric)
    threshold = _threshold(rule, evidence)
    actual = _finite(getattr(metric, _ENDS[rule.judge])) if metric else None
    ends = (_finite(metric.low), _finite(metric.high)) if metric and rule.shows else (actual, actual)
    shown, margin, reason = _number(threshold), None, _problem(rule, metric, actual, threshold)
    decided, holds = False, None
    if not reason and None in ends:
        reason = f"{rule.metric} has no interval"
    if not reason and actual is not None and threshold is not None:
        reason = rule.reason
        margin = _distance(rule, actual, ends, threshold)
        decided = _contradicted(rule, ends, threshold)
        # An interval without a width comes from values that do not vary: it cannot tell how sure it is.
        holds = margin >= -_TOLERANCE and ends[0] != ends[1] if rule.shows else None
        shown = f"{rule.op} {shown}" + (f" ± {rule.tolerance:.4f}" if rule.tolerance is not None else "")
    passed = margin is not None and margin >= -_TOLERANCE
    if margin is not None and rule.undecided == "procedure":
        passed = not decided
    refusal = None
    if not passed:
        cause = _cause(rule, metric, margin, threshold)
        words = rule.reason if margin is not None else f"{rule.reason}: {reason}"
        figures = _figures(rule, metric, shown if margin is not None else f"{rule.op} {shown}")
        refusal = Refusal(words=words, figures=figures, cause=cause, next=_next(cause, rule, evidence))
    return Verdict(
        rule=name,
        metric=rule.metric,
        threshold=shown,
        actual=actual,
        margin=margin,
        shown=holds,
        passed=passed,
        reason=reason,
        refusal=refusal,
    )


def _distance(rule: Rule, actual: float, ends: tuple[float | None, float | None], threshold: float) -> float:
    """Return the distance to the threshold, positive if the rule holds; for `inside` that of the worse end."""
    values = [end for end in ends if end is not None] if rule.op == "inside" else [actual]
    return min(_MARGINS[rule.op](value, threshold, rule.tolerance or 0.0) for value in values)


def _contradicted(rule: Rule, ends: tuple[float | None, float | None], threshold: float) -> bool:
    """Return whether no part of the interval satisfies the rule, so that more samples would not help."""
    low, high = ends
    if low is None or high is None:
        return True
    tolerance = rule.tolerance or 0.0
    beyond = {"<=": low > threshold, ">=": high < threshold}
    return beyond.get(rule.op, low > threshold + tolerance or high < threshold - tolerance)


def _cause(rule: Rule, metric: Metric | None, margin: float | None, threshold: float | None) -> Cause:
    """Return why a rule failed: from what its metric measures, and the side of the threshold that the value is on."""
    if metric is not None and metric.n < rule.min_n and metric.n:
        return Cause.TOO_FEW_SAMPLES
    if metric is None or margin is None or threshold is None:
        return Cause.NOT_MEASURED
    value, more_is_forgotten = _finite(metric.after), MORE_IS_FORGOTTEN.get(rule.metric)
    if value is not None and _MARGINS[rule.op](value, threshold, rule.tolerance or 0.0) >= -_TOLERANCE:
        return Cause.TOO_FEW_SAMPLES  # the value holds, and only the end of its interval does not
    if more_is_forgotten is None:
        return Cause.NOT_FORGOTTEN if rule.targets else Cause.DAMAGED
    source = rule.relative_to
    if source and (source.metric, source.state) == (rule.metric, "before") and not 0 <= threshold <= 1:
        return Cause.NOT_MEASURED  # the model before did not show what had to be forgotten: no model could pass
    above = value is not None and value > threshold
    return Cause.OVER_FORGOTTEN if above == more_is_forgotten else Cause.NOT_FORGOTTEN


def _figures(rule: Rule, metric: Metric | None, required: str) -> str:
    if metric is None:
        return f"{rule.metric} was not measured, required {required}"
    found = f"{rule.metric} {_number(_finite(metric.after))}"
    if (low := _finite(metric.low)) is not None and (high := _finite(metric.high)) is not None:
        found += f", 95 % interval {low:.4f} to {high:.4f}"
    judged = f" of the {rule.judge} end" if rule.judge != "value" else ""
    few = f", at least {rule.min_n} needed" if metric.n < rule.min_n else ""
    return f"{found}, required{judged} {required}, n {metric.n}{few}"


def _next(cause: Cause, rule: Rule, evidence: Evidence) -> str:
    """Return the option or the change that may make a rule hold."""
    other = f"choose a policy without {rule.metric}: --policy FILE"
    if cause is Cause.TOO_FEW_SAMPLES:
        more = "erase more samples in one batch: salun sweep --min-requests N"
        if evidence.generation is not None:
            more = "generate more images: `images` in the evaluation of the model card"
        return f"{more}; or {other}"
    if cause is not Cause.NOT_MEASURED:
        return _strength(evidence, more=cause is Cause.NOT_FORGOTTEN)
    source = rule.relative_to
    if source is not None and source.state == "reference" and rule.metric in evidence.metrics:
        return f"measure a retrained model as well: --retrain-reference; or {other}"
    for name in (rule.metric, source.metric if source else ""):
        if name in EXTRA_METRIC_OF and name not in evidence.metrics:
            return f"measure it: --extra-metrics {EXTRA_METRIC_OF[name]}; or {other}"
    return other


def _strength(evidence: Evidence, *, more: bool) -> str:
    """Return how to unlearn with more or with less strength than the run that the evidence is of."""
    run, way = evidence.run, "more" if more else "less"
    if run.method == "retrain":
        return "retraining cannot be made stronger or gentler: check the forget set and the policy"
    if run.tuning is not None:
        return f"give the search more: --tune-budget (it was {run.tuning.budget}); or --method retrain"
    rate = run.config.get("learning_rate")
    by_hand = f"unlearn with {way} strength"
    if isinstance(rate, float) and math.isfinite(rate) and rate > 0:
        by_hand += f", such as learning_rate={rate * 2 if more else rate / 2:g} (it was {rate:g})"
    tunable = evidence.generation is None and run.method != "unknown"
    return f"{_SEARCH}; or {by_hand}" if tunable else by_hand


def _problem(rule: Rule, metric: Metric | None, actual: float | None, threshold: float | None) -> str:
    """Why the rule cannot be applied; empty if it can."""
    if metric is None:
        return _lacking(rule.metric)
    if actual is None:
        return f"{rule.metric} is missing or not a number"
    if metric.n < rule.min_n:
        return f"{rule.metric} was measured on {metric.n} samples, fewer than {rule.min_n}"
    if (rule.shows or rule.judge != "value") and not _holds_value(metric):
        return f"the interval of {rule.metric} does not hold its value"
    if threshold is not None:
        return ""
    source = rule.relative_to.metric if rule.relative_to else rule.metric
    cause = "" if source in METRIC_NAMES else f": {_lacking(source)}"
    return f"its threshold cannot be computed from the evidence{cause}"


def _holds_value(metric: Metric) -> bool:
    """Whether the value is a number between the ends of its interval that are numbers; every measured one is."""
    value, low, high = _finite(metric.after), _finite(metric.low), _finite(metric.high)
    if value is None:
        return False
    return (low is None or low <= value + _TOLERANCE) and (high is None or high >= value - _TOLERANCE)


def _lacking(metric: str) -> str:
    near = [] if metric in METRIC_NAMES else difflib.get_close_matches(metric, METRIC_NAMES, n=1, cutoff=0.5)
    return f"the evidence has no metric {metric}" + (f"; did you mean {near[0]!r}?" if near else "")


def _threshold(rule: Rule, evidence: Evidence) -> float | None:
    metric = evidence.metrics.get(rule.metric)
    if rule.or_reference and metric is not None and metric.reference is not None and _never_saw(metric, rule):
        return _finite(metric.reference)
    if rule.relative_to is None:
        return rule.value
    source = evidence.metrics.get(rule.relative_to.metric)
    value = _finite(getattr(source, rule.relative_to.state)) if source and source.n else None
    return None if value is None else _finite(rule.relative_to.scale * value + rule.relative_to.offset)


def _never_saw(metric: Metric, rule: Rule) -> bool:
    """Whether the reference knows less of D_f than the model before, by the tolerance; if not, it may have seen D_f.

    A reference within the tolerance of the fixed value needs no such check: it could not be told from it.
    """
    before, reference, tolerance = _finite(metric.before), _finite(metric.reference), rule.tolerance or 0.0
    if reference is None or rule.value is None or abs(reference - rule.value) <= tolerance:
        return True
    return before is not None and (reference < rule.value or before - reference >= tolerance)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
