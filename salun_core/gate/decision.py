"""The decision: policy + evidence -> a verdict per rule and per built-in check. It fails closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from salun_core.config import Document, parse
from salun_core.errors import GateRefusedError
from salun_core.evaluation.evidence import Evidence
from salun_core.gate.levels import Assurance, allowed, by_kind, certainty, claimed, level_of
from salun_core.gate.policy import Level, Policy, Rule
from salun_core.gate.refusal import ANOTHER, SEARCH, Cause, Refusal, Verdict, check, strength
from salun_core.gate.rules import apply

DECISION = "decision.json"
"""Name of the file with the gate's decision: of a version, of a run, and in a working folder."""

_SUMMARY_CHARACTERS = 420  # an outcome takes 500, with what comes before and after
_STRENGTH = {Cause.NOT_FORGOTTEN, Cause.OVER_FORGOTTEN, Cause.DAMAGED}


class Expected(Document):
    """Digests that the publisher computed itself; each given one must equal the evidence's."""

    before: str | None = None
    after: str | None = None
    split: str | None = None
    dataset: str | None = None
    forget_set: str | None = None
    mask: str | None = None


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
        "saw them; of images, that so many show the rules if none of them shows what was forgotten",
    )
    kinds: dict[str, Assurance] = Field(
        default={}, description="level of each kind of forget target, of a forget set of several kinds that passed"
    )
    verdicts: list[Verdict]

    @model_validator(mode="after")
    def _leveled(self) -> GateDecision:
        if self.passed != (self.level is not None):
            raise ValueError("a decision that passed needs a `level`, and a refusal has none")
        return self

    def assurance(self, kind: str = "", requests: int | None = None) -> Assurance:
        """Return the assurance that a decision that passed gives a request.

        If `kind`, the kind of the request's target, has a level in the decision, it counts; otherwise the run's does.
        `requests` is how many requests were measured together. Raises UsageError if the gate refused.
        """
        names = ("level", "margin", "n", "power")
        found = self.kinds.get(kind) or self
        fields = {name: getattr(found, name) for name in names}
        return parse(Assurance, {**fields, "requests": requests}, "the gate's decision")

    @property
    def refusals(self) -> list[Refusal]:
        """Why each failed rule failed."""
        return [verdict.refusal for verdict in self.verdicts if verdict.refusal]

    @property
    def next(self) -> str:
        """What to do after a refusal; empty if the gate passed."""
        strengths = {refusal.cause: refusal.next for refusal in self.refusals if refusal.cause in _STRENGTH}
        if len(set(strengths.values())) > 1:  # more strength and less at once
            tunable = any(refusal.next.startswith(SEARCH) for refusal in self.refusals)
            return f"{SEARCH}; or {ANOTHER}" if tunable else ANOTHER
        return "; ".join(dict.fromkeys(refusal.next for refusal in self.refusals))

    @property
    def counts(self) -> str:
        """How many checks failed, of how many."""
        return f"{sum(not verdict.passed for verdict in self.verdicts)} of {len(self.verdicts)} checks failed"

    def require(self, where: str = "", *, told: bool = False) -> None:
        """Raise GateRefusedError, with the reasons of all failed verdicts and what to do, unless the gate passed.

        `where` is the path or address of the file with the decision, for the message. If the reasons and the next step
        have been printed already (`told`), the message leaves them out.
        """
        if not self.passed:
            why = self.counts if told else self.summary
            then = "the reasons and the next step are above" if told else self.next
            steps = [then, f"the decision is in {where}" if where else "", "nothing was published"]
            raise GateRefusedError("the gate refused the model", why, "; ".join(filter(None, steps)))


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
    claims = claimed(policy, evidence)
    retrained = bool(claims) and all(verdict.passed for verdict in claims)
    of_kinds = [rule for rule in policy.rules if not rule.targets or kinds & set(rule.targets)]
    applying = [rule for rule in of_kinds if not (rule.unless_retrained and retrained)]
    judged = [apply(rule, evidence) for rule in applying]
    levels = by_kind(applying, judged, evidence, retrained)
    verdicts = [
        *_builtin(evidence, expected or Expected()),
        *claims,
        _covers(policy, applying, kinds),
        *allowed(policy, levels, evidence),
        *_plugins(policy, evidence),
        *judged,
    ]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return GateDecision(
        passed=not failed,
        policy=policy.name,
        policy_digest=policy.digest,
        evidence_digest=evidence.digest,
        summary=_summary(failed) or f"all {len(verdicts)} checks hold",
        level=None if failed else level_of(judged, retrained),
        **certainty(applying, evidence),
        kinds={} if failed or len(evidence.forgotten.kinds) < 2 else levels,
        verdicts=verdicts,
    )


def _summary(failed: Sequence[Verdict]) -> str:
    """Return the failed rules in one line that has room in an outcome and an error."""
    lines = [f"{item.refusal.words} ({item.refusal.figures}; {item.refusal.cause})" for item in failed if item.refusal]
    shown = lines[:1]
    while len(shown) < len(lines) and len("; ".join([*shown, lines[len(shown)]])) <= _SUMMARY_CHARACTERS:
        shown.append(lines[len(shown)])
    more = len(lines) - len(shown)
    return "; ".join([*shown, *([f"and {more} more failed checks"] if more else [])])


def _builtin(evidence: Evidence, expected: Expected) -> list[Verdict]:
    measured, integrity, forgotten = evidence.measured, evidence.integrity, evidence.forgotten
    verdicts = []
    for name, digest in expected.model_dump(exclude_none=True).items():
        thing = name.replace("_", " ")
        then = f"evaluate again with the {thing} at hand: salun evaluate --help"
        same = getattr(measured, name) == digest
        other = f"the evidence was measured on another {thing}"
        verdicts.append(check(f"{name} digest", same, digest[:12], other, Cause.INTEGRITY, then))
    part = 0 < forgotten.count < forgotten.train_count
    changed = measured.before != measured.after and integrity.weights_changed > 0
    frozen = integrity.frozen_changed == 0 if measured.mask else integrity.frozen_changed in (None, 0)
    empty = "the forget set is empty or is the whole training split"
    others = "name samples that were trained on, and not all of them"
    outside = "weights outside the mask changed, or were not compared"
    with_mask = "evaluate again with the mask that the run used: salun evaluate --mask"
    more, less = strength(evidence, more=True), strength(evidence, more=False)
    finite, nan = integrity.non_finite == 0, "the weights contain NaN or infinity"
    return [
        *verdicts,
        check("forget set", part, "not empty, not all data", empty, Cause.INTEGRITY, others),
        check("model changed", changed, "> 0 weights", "the model did not change", Cause.NOT_FORGOTTEN, more),
        check("weights finite", finite, "0 non-finite", nan, Cause.DAMAGED, less),
        check("frozen weights", frozen, "0 changed", outside, Cause.INTEGRITY, with_mask),
    ]


def _plugins(policy: Policy, evidence: Evidence) -> list[Verdict]:
    """Check that the policy allows the plug-ins behind the evidence; no verdict if there are none."""
    used, method = evidence.all_plugins, evidence.run.method
    refused = [f"the policy does not allow the {record.words}" for record in policy.refused(used)]
    if ":" in method and not any((record.kind, record.name) == ("method", method) for record in used):
        refused.append(f"the evidence does not name the files of the method {method}")
    if not used and not refused:
        return []
    listed = ", ".join(policy.plugins) if isinstance(policy.plugins, list) else policy.plugins
    then = "use a method and metrics that ship, or list the plug-in under `plugins` in a policy of your own"
    required = listed or "the architecture of the line only"
    return [check("plug-ins", not refused, required, "; ".join(refused), Cause.INTEGRITY, then)]


def _covers(policy: Policy, applying: Sequence[Rule], kinds: set[str]) -> Verdict:
    """Check that a rule applies, and that a policy with rules for single kinds has some for each kind in the set."""
    named = {target for rule in policy.rules for target in rule.targets}
    covered = bool(applying) and bool(kinds) and (not named or kinds <= named)
    reason = "the policy does not cover the forget set's kind"
    then = f"choose a policy with rules for {' and '.join(sorted(kinds)) or 'the forget target'}: --policy FILE"
    return check("a rule applies", covered, f"{len(applying)} rules", reason, Cause.NOT_MEASURED, then)
