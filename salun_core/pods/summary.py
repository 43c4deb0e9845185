"""What a pipeline's user interface shows of the evidence: plain numbers and lists, nothing of a sample."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.steps.outcome import OutcomeRecord

MAX_CLASSES = 100  # a confusion matrix grows with the square, and lies in the interface's database


def scalar_metrics(evidence: Evidence | None) -> dict[str, float]:
    """Return the figures by which runs are compared, such as `UA_before`; what was not measured is absent.

    `UA_before`, `UA_after`, `UA_reference` and so on for each metric, `seconds_unlearn` and so on for each timed part,
    `mask_density`, `weights_changed_ratio` and `forget_ratio`. Ratios from 0 to 1, but for FID and KID (distances),
    CLIP (0 to 100) and the seconds.
    """
    if evidence is None:
        return {}
    found: dict[str, float | None] = {
        f"{name}_{state}": getattr(metric, state)
        for name, metric in evidence.metrics.items()
        for state in ("before", "after", "reference")
    }
    found |= {f"seconds_{part}": seconds for part, seconds in evidence.run.seconds.items()}
    found["mask_density"] = evidence.run.density
    found["weights_changed_ratio"] = _ratio(evidence.integrity.weights_changed, evidence.integrity.weights)
    found["forget_ratio"] = _ratio(evidence.forgotten.count, evidence.forgotten.train_count)
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def confusion(evidence: Evidence | None) -> tuple[list[str], list[list[int]]] | None:
    """Return class names and the confusion matrix of the test split or the generated images, for the model after.

    Rows are true classes, columns predicted ones. None beyond 100 classes, where no matrix was measured, or where it is
    not square, as of prompts that a judge sorts into its classes. Equal names are told apart by their class id.
    """
    if evidence is None:
        return None
    names = evidence.classes
    if not evidence.confusion or len(names) > MAX_CLASSES:
        return None
    if {len(names)} != {len(evidence.confusion), *map(len, evidence.confusion)}:
        return None
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names)]
    return list(names), [list(row) for row in evidence.confusion]


def roc_points(evidence: Evidence | None) -> tuple[list[float], list[float], list[float]] | None:
    """Return the membership attack's ROC curve after unlearning: false and true positive rates, and thresholds.

    None if the attack could not be made, as on a generative model: log no curve then. The evidence keeps no losses, so
    the thresholds are the points' ranks, falling from 1 to 0: finite, as a user interface needs them.
    """
    curve = evidence.roc.get("after") if evidence else None
    if curve is None or not curve.fpr:
        return None
    last = max(len(curve.fpr) - 1, 1)
    return list(curve.fpr), list(curve.tpr), [1 - index / last for index in range(len(curve.fpr))]


def markdown(outcome: OutcomeRecord, asked: str = "", decision: GateDecision | None = None) -> str:
    """Return a Markdown summary for the user interface: what was asked, what was done, the verdict, and where to look.

    `asked` is a sentence without sample ids.
    """
    return "\n".join(_lines(outcome, asked, decision)) + "\n"


def _lines(outcome: OutcomeRecord, asked: str, decision: GateDecision | None) -> Iterator[str]:
    yield f"# {outcome.line}: {outcome.state.replace('_', ' ')}"
    yield f"\n{outcome.text}"
    if outcome.assurance:
        yield f"\nAssurance level **{outcome.assurance.figures}**. {outcome.assurance.text}"
    if asked:
        yield f"\n{asked}"
    if outcome.completed or outcome.queued or outcome.failed:
        counts = f"{outcome.completed} completed, {outcome.queued} queued again, {outcome.failed} for a person"
        yield f"\nRequests: {counts}."
    if decision is not None:
        yield f"\n| Rule of policy {decision.policy} | Threshold | Measured | Verdict |\n|---|---|--:|---|"
        for item in decision.verdicts:
            measured = "" if item.actual is None else f"{item.actual:.4g}"
            yield f"| {item.rule} | {item.threshold} | {measured} | {'holds' if item.passed else '**fails**'} |"
        yield ""
        yield from (f"- {refusal.text}" for refusal in decision.refusals)
    yield ""
    if outcome.version:
        yield f"- Version: `{outcome.line}@{outcome.version[:12]}`"
    if outcome.report:
        yield f"- Report: `{outcome.report}`"
    yield f"- Run: `{outcome.run}`"
    if outcome.next:
        yield f"- Next: {outcome.next}"


def empty_report(text: str) -> str:
    """Return the page that takes the place of a report if a run ended before it had one."""
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    page = f"<title>No report</title></head><body><p>No report: {html.escape(text)}</p></body></html>"
    return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{policy}\n{page}\n'
