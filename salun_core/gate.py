"""The gate: policy + evidence -> decision with a verdict per rule. It fails closed.

Some checks are enforced under every policy: the digests are the expected ones, the forget set is not empty,
the model changed, its weights are finite, and the weights outside the mask kept their bits.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from salun_core.config import Document, load, parse, parse_text
from salun_core.digest import digest_json
from salun_core.errors import GateRefusedError, unknown_name
from salun_core.evaluation.evidence import METRIC_NAMES, Evidence, Metric

State = Literal["before", "after", "reference", "origin"]
_TOLERANCE = 1e-12  # of comparisons: 0.9 - 0.02 in binary is not 0.88
_ENDS = {"value": "after", "low": "low", "high": "high"}
_MARGINS: dict[str, Callable[[float, float, float], float]] = {
    "<=": lambda actual, threshold, _: threshold - actual,
    ">=": lambda actual, threshold, _: actual - threshold,
    "within": lambda actual, threshold, tolerance: tolerance - abs(actual - threshold),
}


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
    op: Literal["<=", ">=", "within"] = Field(description="`within`: |metric - threshold| <= tolerance")
    value: float | None = Field(default=None, allow_inf_nan=False, description="fixed threshold, as a ratio")
    relative_to: Relative | None = Field(default=None, description="threshold computed from the evidence")
    tolerance: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="for `within`")
    judge: Literal["value", "low", "high"] = Field(
        default="value", description="compare the value after, or an end of its 95 % interval"
    )
    targets: list[Literal["samples", "class", "subject", "concept"]] = Field(
        default=[], description="forget targets that the rule applies to; empty: all"
    )
    min_n: int = Field(default=1, ge=1, description="minimum number of samples behind the metric")
    reason: str = Field(min_length=1, description="why the rule exists, for the report")

    @model_validator(mode="after")
    def _one_threshold(self) -> Rule:
        if (self.value is None) == (self.relative_to is None):
            raise ValueError("give exactly one of `value` and `relative_to`")
        if (self.op == "within") != (self.tolerance is not None):
            raise ValueError("`within` needs a `tolerance`, and no other operator takes one")
        return self


class Policy(Document):
    """A named list of rules; all that apply must hold."""

    format: Literal["salun.policy/v1"] = "salun.policy/v1"
    name: str = Field(min_length=1)
    rules: list[Rule] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """SHA-256 of the policy's canonical JSON."""
        return digest_json(self.model_dump(mode="json"))


class Expected(Document):
    """Digests that the publisher computed itself; each given one must equal the evidence's."""

    before: str | None = None
    after: str | None = None
    split: str | None = None
    dataset: str | None = None
    forget_set: str | None = None
    mask: str | None = None


class Verdict(Document):
    """Result of one rule or one built-in check."""

    rule: str
    metric: str | None = None
    threshold: str
    actual: float | None = None
    margin: float | None = Field(default=None, description="distance to the threshold, positive when it holds")
    passed: bool
    reason: str


class GateDecision(Document):
    """The gate's decision, stored with the version."""

    format: Literal["salun.decision/v1"] = "salun.decision/v1"
    passed: bool
    policy: str
    policy_digest: str
    evidence_digest: str
    summary: str
    verdicts: list[Verdict]

    def require(self) -> None:
        """Raise unless the gate passed.

        Raises:
            GateRefusedError: with the reasons of all failed verdicts.
        """
        if not self.passed:
            raise GateRefusedError(
                "the gate refused the model", self.summary, "see decision.json; nothing was published"
            )


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
    if generation is None:
        return "classifier"
    if generation.task == "class-conditional":
        return "ddpm"
    return "nsfw" if generation.detector else "stable-diffusion"


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
    kinds = set(evidence.forgotten.kinds)
    applying = [rule for rule in policy.rules if not rule.targets or kinds & set(rule.targets)]
    named = {target for rule in policy.rules for target in rule.targets}
    covered = bool(applying) and bool(kinds) and (not named or kinds <= named)
    verdicts = [
        *_builtin(evidence, expected or Expected()),
        _check("a rule applies", covered, f"{len(applying)} rules", "the policy does not cover the forget set's kind"),
        *(_apply(rule, evidence) for rule in applying),
    ]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return GateDecision(
        passed=not failed,
        policy=policy.name,
        policy_digest=policy.digest,
        evidence_digest=evidence.digest,
        summary="; ".join(f"{v.rule}: {v.reason}" for v in failed) or f"all {len(verdicts)} checks hold",
        verdicts=verdicts,
    )


def digest_of(evidence: Evidence) -> str:
    """Return the SHA-256 of the evidence's canonical JSON, as a decision names it."""
    return evidence.digest


def _builtin(evidence: Evidence, expected: Expected) -> list[Verdict]:
    measured, integrity, forgotten = evidence.measured, evidence.integrity, evidence.forgotten
    verdicts = []
    for name, digest in expected.model_dump(exclude_none=True).items():
        other = f"the evidence was measured on another {name.replace('_', ' ')}"
        verdicts.append(_check(f"{name} digest", getattr(measured, name) == digest, digest[:12], other))
    part = 0 < forgotten.count < forgotten.train_count
    changed = measured.before != measured.after and integrity.weights_changed > 0
    frozen = integrity.frozen_changed == 0 if measured.mask else integrity.frozen_changed in (None, 0)
    empty = "the forget set is empty or is the whole training split"
    return [
        *verdicts,
        _check("forget set", part, "not empty, not all data", empty),
        _check("model changed", changed, "> 0 weights", "the model did not change"),
        _check("weights finite", integrity.non_finite == 0, "0 non-finite", "the weights contain NaN or infinity"),
        _check("frozen weights", frozen, "0 changed", "weights outside the mask changed, or were not compared"),
    ]


def _check(rule: str, passed: bool, threshold: str, reason: str) -> Verdict:
    return Verdict(rule=rule, threshold=threshold, passed=passed, reason="holds" if passed else reason)


def _apply(rule: Rule, evidence: Evidence) -> Verdict:
    name = f"{rule.metric} {rule.op}" + (f" ({rule.judge} end)" if rule.judge != "value" else "")
    metric = evidence.metrics.get(rule.metric)
    threshold = _threshold(rule, evidence)
    actual = _finite(getattr(metric, _ENDS[rule.judge])) if metric else None
    shown, margin, reason = _number(threshold), None, _problem(rule, metric, actual, threshold)
    if not reason and actual is not None and threshold is not None:
        margin, reason = _MARGINS[rule.op](actual, threshold, rule.tolerance or 0.0), rule.reason
        shown = f"{rule.op} {shown}" + (f" ± {rule.tolerance:.4f}" if rule.tolerance is not None else "")
    return Verdict(
        rule=name,
        metric=rule.metric,
        threshold=shown,
        actual=actual,
        margin=margin,
        passed=margin is not None and margin >= -_TOLERANCE,
        reason=reason,
    )


def _problem(rule: Rule, metric: Metric | None, actual: float | None, threshold: float | None) -> str:
    """Why the rule cannot be applied; empty if it can."""
    if metric is None:
        return _lacking(rule.metric)
    if actual is None:
        return f"{rule.metric} is missing or not a number"
    if metric.n < rule.min_n:
        return f"{rule.metric} was measured on {metric.n} samples, fewer than {rule.min_n}"
    if threshold is not None:
        return ""
    source = rule.relative_to.metric if rule.relative_to else rule.metric
    cause = "" if source in METRIC_NAMES else f": {_lacking(source)}"
    return f"its threshold cannot be computed from the evidence{cause}"


def _lacking(metric: str) -> str:
    near = [] if metric in METRIC_NAMES else difflib.get_close_matches(metric, METRIC_NAMES, n=1, cutoff=0.5)
    return f"the evidence has no metric {metric}" + (f"; did you mean {near[0]!r}?" if near else "")


def _threshold(rule: Rule, evidence: Evidence) -> float | None:
    if rule.relative_to is None:
        return rule.value
    source = evidence.metrics.get(rule.relative_to.metric)
    value = _finite(getattr(source, rule.relative_to.state)) if source and source.n else None
    return None if value is None else _finite(rule.relative_to.scale * value + rule.relative_to.offset)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
