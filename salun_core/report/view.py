"""What the template shows, worked out beforehand, so that the template has no logic of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun_core.report import wording

if TYPE_CHECKING:
    from salun_core.evaluation.evidence import Evidence, Metric
    from salun_core.gate import GateDecision, Verdict


@dataclass(frozen=True)
class Banner:
    """The verdict and one line why."""

    state: str
    title: str
    why: str
    reasons: list[str]


@dataclass(frozen=True)
class Judged:
    """One rule's answer as text."""

    rule: str
    threshold: str
    actual: str
    margin: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One metric with all rules on it."""

    name: str
    title: str
    meaning: str
    before: str
    after: str
    interval: str
    reference: str
    n: str
    rules: list[Judged]


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    title: str
    before: str
    after: str
    reference: str


def banner(decision: GateDecision | None, matches: bool, generated: bool = False) -> Banner:
    """Say how the gate judged.

    Args:
        decision: the gate's answer, if there is one.
        matches: whether it was made on the evidence shown.
        generated: whether the evidence is of generated images, whose metrics have words of their own.

    Returns:
        The banner: passed, refused, or not judged.
    """
    if decision is None:
        return Banner("open", "NOT JUDGED", "These are measurements only: no gate decision was given.", [])
    if not matches:
        why = "The decision was made on other evidence than the numbers below. Treat the model as refused."
        return Banner("refused", "REFUSED", why, [])
    failed = [verdict for verdict in decision.verdicts if not verdict.passed]
    if decision.passed:
        why = f"All {len(decision.verdicts)} checks of policy “{decision.policy}” hold."
        return Banner("passed", "PASSED", why, [])
    why = f"{len(failed)} of {len(decision.verdicts)} checks of policy “{decision.policy}” failed. Do not publish it."
    return Banner("refused", "REFUSED", why, [_reason(item, generated) for item in failed] or [decision.summary])


def _reason(verdict: Verdict, generated: bool) -> str:
    name = wording.words(verdict.metric, generated).title if verdict.metric else verdict.rule
    if verdict.metric is None or verdict.margin is None:
        return f"{name}: {verdict.reason}"
    found = wording.number(verdict.metric, verdict.actual)
    wanted = wording.threshold(verdict.metric, verdict.threshold)
    return f"{name} is {found}, required {wanted}. The rule: {verdict.reason}."


def rows(evidence: Evidence, decision: GateDecision | None) -> list[Row]:
    """Return one row a metric, and one for each metric that a rule asked for and the evidence lacks."""
    verdicts = decision.verdicts if decision else []
    asked = dict.fromkeys(verdict.metric for verdict in verdicts if verdict.metric)
    generated = evidence.generation is not None
    known = [name for name in (wording.GENERATED if generated else wording.METRICS) if name in evidence.metrics]
    names = dict.fromkeys([*known, *evidence.metrics, *asked])
    return [
        _row(
            name, wording.words(name, generated), evidence.metrics.get(name), [v for v in verdicts if v.metric == name]
        )
        for name in names
    ]


def _row(name: str, words: wording.Words, metric: Metric | None, verdicts: Sequence[Verdict]) -> Row:
    return Row(
        name=name,
        title=words.title,
        meaning=words.meaning,
        before=wording.number(name, metric.before if metric else None),
        after=wording.number(name, metric.after if metric else None),
        interval=wording.interval(name, metric.low, metric.high) if metric else "",
        reference=wording.number(name, metric.reference if metric else None),
        n=wording.count(metric.n if metric else None),
        rules=[judged(verdict) for verdict in verdicts],
    )


def judged(verdict: Verdict) -> Judged:
    """Return a verdict as text."""
    return Judged(
        rule=verdict.rule,
        threshold=wording.threshold(verdict.metric, verdict.threshold),
        actual=wording.number(verdict.metric, verdict.actual),
        margin=wording.margin(verdict.metric, verdict.margin),
        passed=verdict.passed,
        reason=verdict.reason,
    )


def built_in(decision: GateDecision | None) -> list[Judged]:
    """Return the checks that no policy can switch off."""
    return [judged(verdict) for verdict in (decision.verdicts if decision else []) if verdict.metric is None]


def tiles(evidence: Evidence) -> list[Tile]:
    """Return the headline figures that were measured."""
    titles = wording.GENERATED_TILES if evidence.generation else wording.TILES
    found = [(title, name, evidence.metrics[name]) for name, title in titles.items() if name in evidence.metrics]
    return [
        Tile(
            title=title,
            before=wording.number(name, metric.before),
            after=wording.number(name, metric.after),
            reference=wording.number(name, metric.reference),
        )
        for title, name, metric in found
    ]


def limits(evidence: Evidence) -> list[str]:
    """Return what the evidence cannot show."""
    made = evidence.generation
    spreads = [
        ((metric.high - metric.low) / 2, wording.words(name, made is not None).title)
        for name, metric in evidence.metrics.items()
        if name not in wording.UNITS
        and metric.low is not None
        and metric.high is not None
        and math.isfinite(metric.high - metric.low)
    ]
    half, title = max(spreads, default=(0.0, ""))
    widest = (title, half) if spreads else None
    reference = evidence.measured.reference is not None
    if made is None:
        more = wording.optional_metric_limits(evidence.further, reference) if evidence.further else []
        return [*wording.limits(evidence.forgotten.count, widest, reference), *more]
    relearned = max((point.step for point in made.resurgence), default=0)
    return wording.diffusion_limits(made.images, widest, reference, "attack_success" in evidence.metrics, relearned)


def forgotten(evidence: Evidence) -> str:
    """Return how much was forgotten: samples of all training samples, or for a concept the images generated of it."""
    facts = evidence.forgotten
    if facts.kinds == ["concept"]:
        return f"{wording.count(facts.count)} generated images of a concept"
    more = " and generated images" if "concept" in facts.kinds else ""
    return f"{wording.count(facts.count)} of {wording.count(facts.train_count)} training samples{more}"


def changed_weights(evidence: Evidence) -> str:
    """Return in one sentence what comparing the weights bit by bit gave."""
    facts = evidence.integrity
    share = facts.weights_changed / facts.weights if facts.weights else 0.0
    frozen = "weights outside the mask were not compared"
    if facts.frozen_changed is not None:
        frozen = f"{facts.frozen_changed:,} outside the mask changed"
    return (
        f"{facts.weights_changed:,} of {facts.weights:,} weights changed ({share:.2%}); {frozen}; "
        f"{facts.buffers_changed:,} buffer values changed; {facts.non_finite:,} are not finite."
    )
