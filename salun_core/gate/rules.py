"""One rule and evidence: the threshold, the distance to it, and why the rule fails."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from salun_core.evaluation.evidence import EVALUATE_MORE, Evidence, Metric
from salun_core.evaluation.metrics import find_row, metric_names
from salun_core.gate.policy import ADVERSE, Rule
from salun_core.gate.refusal import MORE_IMAGES, Cause, Refusal, Verdict, strength

_TOLERANCE = 1e-12  # of comparisons: 0.9 - 0.02 in binary is not 0.88
_ENDS = {"value": "after", "low": "low", "high": "high"}
_MARGINS: dict[str, Callable[[float, float, float], float]] = {
    "<=": lambda actual, threshold, _: threshold - actual,
    ">=": lambda actual, threshold, _: actual - threshold,
    "within": lambda actual, threshold, tolerance: tolerance - abs(actual - threshold),
    "inside": lambda actual, threshold, tolerance: tolerance - abs(actual - threshold),
}


def apply(rule: Rule, evidence: Evidence) -> Verdict:
    """Judge evidence by one rule."""
    metric = evidence.metrics.get(rule.metric)
    rule, written = _on_sample(rule, metric), rule
    threshold = threshold_of(rule, evidence)
    actual = finite(getattr(metric, _ENDS[rule.judge])) if metric else None
    ends = (finite(metric.low), finite(metric.high)) if metric and rule.shows else (actual, actual)
    shown, margin, reason = _number(threshold), None, _problem(rule, metric, actual, threshold)
    decided, holds = False, None
    if not reason and None in ends:
        reason = f"{rule.metric} has no interval"
    if not reason and actual is not None and threshold is not None:
        reason = rule.reason
        margin = _distance(rule, actual, ends, threshold)
        decided = _contradicted(rule, ends, threshold)
        # An interval without a width comes from values that do not vary: it cannot tell how sure it is.
        holds = margin >= -_TOLERANCE and ends[0] != ends[1] if written.shows else None
        shown = f"{rule.op} {shown}" + (f" ± {rule.tolerance:.4f}" if rule.tolerance is not None else "")
    passed = margin is not None and margin >= -_TOLERANCE
    if margin is not None and rule.undecided == "procedure":
        passed = not decided
    refusal = None
    if not passed:
        cause = _cause(rule, evidence, margin, threshold)
        words = rule.reason if margin is not None else f"{rule.reason}: {reason}"
        figures = _figures(rule, metric, shown if margin is not None else f"{rule.op} {shown}")
        refusal = Refusal(words=words, figures=figures, cause=cause, next=_next(cause, rule, evidence))
    return Verdict(
        rule=_name(rule),
        metric=rule.metric,
        threshold=shown,
        actual=actual,
        margin=margin,
        shown=holds,
        close=_close(metric, margin, threshold),
        passed=passed,
        reason=reason,
        refusal=refusal,
    )


def _name(rule: Rule) -> str:
    return f"{rule.metric} {rule.op}" + (f" ({rule.judge} end)" if rule.judge != "value" else "")


def _on_sample(rule: Rule, metric: Metric | None) -> Rule:
    """Return the rule that holds for a metric: of a sample, the end of the interval that is against the model counts.

    All images would give some value within the interval. The model must hold the rule at each of them.
    """
    if metric is None or metric.population is None or rule.op == "inside":
        return rule
    if rule.op == "within":
        return rule.model_copy(update={"op": "inside", "judge": "value"})
    return rule.model_copy(update={"judge": ADVERSE[rule.op]})


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


def _close(metric: Metric | None, margin: float | None, threshold: float | None) -> bool:
    """Return whether the distance to the threshold is at most what one sample adds to a mean over all of them."""
    if metric is None or margin is None or threshold is None or not metric.n:
        return False
    return abs(margin) * metric.n <= max(1.0, abs(threshold)) + _TOLERANCE


def _cause(rule: Rule, evidence: Evidence, margin: float | None, threshold: float | None) -> Cause:
    """Return why a rule failed: from what its metric measures, and the side of the threshold that the value is on.

    A metric that is not known to measure forgetting counts as damage, also one of a plug-in that is not an attack. So a
    cause that is unclear never leads to a stronger recipe. `targets` of the rule tell nothing: they select requests.
    """
    metric = evidence.metrics.get(rule.metric)
    if metric is not None and metric.n < rule.min_n and metric.n:
        return Cause.TOO_FEW_SAMPLES
    if metric is None or margin is None or threshold is None:
        return Cause.NOT_MEASURED
    value, row = finite(metric.after), find_row(rule.metric)
    more_is_forgotten = row.more_is_forgotten if row else None
    if any((record.kind, record.name) == ("attack", rule.metric) for record in evidence.all_plugins):
        more_is_forgotten = False
    if value is not None and _MARGINS[rule.op](value, threshold, rule.tolerance or 0.0) >= -_TOLERANCE:
        return Cause.TOO_FEW_SAMPLES  # the value holds, and only the end of its interval does not
    if more_is_forgotten is None:
        return Cause.DAMAGED
    if (area := evidence.metrics.get(row.side if row else "")) is not None and area.after is not None:
        return Cause.OVER_FORGOTTEN if area.after < 0.5 else Cause.NOT_FORGOTTEN
    source = rule.relative_to
    if source and (source.metric, source.state) == (rule.metric, "before") and not 0 <= threshold <= 1:
        return Cause.NOT_MEASURED  # the model before did not show what had to be forgotten: no model could pass
    above = value is not None and value > threshold
    return Cause.OVER_FORGOTTEN if above == more_is_forgotten else Cause.NOT_FORGOTTEN


def _figures(rule: Rule, metric: Metric | None, required: str) -> str:
    if metric is None:
        return f"{rule.metric} was not measured, required {required}"
    found = f"{rule.metric} {_number(finite(metric.after))}"
    if (low := finite(metric.low)) is not None and (high := finite(metric.high)) is not None:
        found += f", 95 % interval {low:.4f} to {high:.4f}"
    judged = f" of the {rule.judge} end" if rule.judge != "value" else ""
    few = f", at least {rule.min_n} needed" if metric.n < rule.min_n else ""
    of = f" of {metric.population}" if metric.population is not None else ""
    return f"{found}, required{judged} {required}, n {metric.n}{of}{few}"


def _next(cause: Cause, rule: Rule, evidence: Evidence) -> str:
    """Return the option or the change that may make a rule hold."""
    other = f"choose a policy without {rule.metric}: --policy FILE"
    if (metric := evidence.metrics.get(rule.metric)) is not None and metric.population is not None:
        alone = cause is Cause.TOO_FEW_SAMPLES or (cause is Cause.NOT_MEASURED and metric.low is None)
        if alone:  # a larger sample, or all images, may decide it
            return f"{EVALUATE_MORE}; or {other}"
    if cause is Cause.TOO_FEW_SAMPLES:
        images = evidence.generation is not None
        more = MORE_IMAGES if images else "erase more samples in one batch: salun sweep --min-requests N"
        return f"{more}; or {other}"
    if cause is not Cause.NOT_MEASURED:
        return strength(evidence, more=cause is Cause.NOT_FORGOTTEN)
    source = rule.relative_to
    if source is not None and source.state == "reference" and rule.metric in evidence.metrics:
        return f"measure a retrained model as well: --retrain-reference; or {other}"
    for name in (rule.metric, source.metric if source else ""):
        row = find_row(name)
        switch = row.extra if row else name if ":" in name else ""  # package:object is its own switch
        if switch and name not in evidence.metrics:
            return f"measure it: --extra-metrics {switch}; or {other}"
    if find_row(rule.metric) and rule.metric not in evidence.metrics and evidence.generation is None:
        return f"evaluate again: salun evaluate; or {other}"
    return other


def _problem(rule: Rule, metric: Metric | None, actual: float | None, threshold: float | None) -> str:
    """Why the rule cannot be applied; empty if it can."""
    if metric is None:
        return _lacking(rule.metric)
    if actual is None and metric.population is not None and finite(metric.after) is not None:
        return f"{rule.metric} was measured on a sample and has no interval"
    if actual is None:
        return f"{rule.metric} is missing or not a number"
    if metric.n < rule.min_n:
        return f"{rule.metric} was measured on {metric.n} samples, fewer than {rule.min_n}"
    if (rule.shows or rule.judge != "value") and not _holds_value(metric):
        return f"the interval of {rule.metric} does not hold its value"
    if threshold is not None:
        return ""
    source = rule.relative_to.metric if rule.relative_to else rule.metric
    cause = "" if find_row(source) else f": {_lacking(source)}"
    return f"its threshold cannot be computed from the evidence{cause}"


def _holds_value(metric: Metric) -> bool:
    """Whether the value is a number between the ends of its interval that are numbers; every measured one is."""
    value, low, high = finite(metric.after), finite(metric.low), finite(metric.high)
    if value is None:
        return False
    return (low is None or low <= value + _TOLERANCE) and (high is None or high >= value - _TOLERANCE)


def _lacking(metric: str) -> str:
    near = [] if find_row(metric) else difflib.get_close_matches(metric, metric_names(), n=1, cutoff=0.5)
    return f"the evidence has no metric {metric}" + (f"; did you mean {near[0]!r}?" if near else "")


def threshold_of(rule: Rule, evidence: Evidence) -> float | None:
    """Return the threshold of a rule, computed from the evidence if it is relative; None if that cannot be done."""
    metric = evidence.metrics.get(rule.metric)
    if rule.or_reference and metric is not None and metric.reference is not None and _never_saw(metric, rule):
        reference = finite(metric.reference)
        return max(reference, rule.value or 0.0) if reference is not None and rule.op == "<=" else reference
    if rule.relative_to is None:
        return rule.value
    source = evidence.metrics.get(rule.relative_to.metric)
    value = finite(getattr(source, rule.relative_to.state)) if source and source.n else None
    if source and source.population is not None and rule.relative_to.state == "after" and rule.op in ADVERSE:
        high = (rule.op == ">=") == (rule.relative_to.scale >= 0)  # the end of the interval that is harder to meet
        value = finite(source.high if high else source.low)
    return None if value is None else finite(rule.relative_to.scale * value + rule.relative_to.offset)


def _never_saw(metric: Metric, rule: Rule) -> bool:
    """Whether the reference knows less of D_f than the model before, by the tolerance; if not, it may have seen D_f.

    A reference within the tolerance of the fixed value needs no such check: it could not be told from it.
    """
    before, reference, tolerance = finite(metric.before), finite(metric.reference), rule.tolerance or 0.0
    if reference is None or rule.value is None or abs(reference - rule.value) <= tolerance:
        return True
    return before is not None and (reference < rule.value or before - reference >= tolerance)


def finite(value: float | None) -> float | None:
    """Return the value, or None for one that is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
