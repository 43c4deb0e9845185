"""Words and number formats of the report: a ratio in JSON is a percentage with two decimals on the page."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

MISSING = "–"
_THRESHOLD = re.compile(r"(?:(<=|>=|within) )?(-?\d+\.\d+)(?: ± (\d+\.\d+))?")
_SIGNS = {"<=": "≤", ">=": "≥", "within": "within", None: ""}
NBSP = "\N{NO-BREAK SPACE}"


class Words(NamedTuple):
    """How a metric is told."""

    title: str
    meaning: str


METRICS = {
    "UA": Words("Unlearning accuracy (UA)", "forgotten samples that the model gets wrong"),
    "RA": Words("Retain accuracy (RA)", "kept training samples that it gets right"),
    "TA": Words("Test accuracy (TA)", "unseen test samples that it gets right"),
    "MIA": Words("Membership attack (MIA)", "forgotten samples that a confidence attack calls never seen"),
    "MIA_entropy": Words("Membership attack, modified entropy", "the same with the attack of Song and Mittal"),
    "attack_auc": Words("Attack AUC", "forgotten against test samples, told apart by loss; 0.5 is guessing"),
    "gap": Words("Average gap", "mean distance to the retrained model over UA, RA, TA and MIA"),
}
TILES = {
    "UA": "Forget set: got wrong",
    "RA": "Kept data: accuracy",
    "TA": "Unseen data: accuracy",
    "MIA": "Attack calls “never seen”",
}


def words(metric: str) -> Words:
    """Return title and meaning of a metric; an unknown one keeps its own name."""
    return METRICS.get(metric, Words(metric, ""))


def number(metric: str | None, value: float | None) -> str:
    """Return a value as the page shows it: a percentage, or for an AUC four decimals."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.4f}" if metric == "attack_auc" else f"{value * 100:.2f}{NBSP}%"


def interval(metric: str, low: float | None, high: float | None) -> str:
    """Return a 95 % interval in brackets, empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{number(metric, low).removesuffix(f'{NBSP}%')}, {number(metric, high)}]"


def margin(metric: str | None, value: float | None) -> str:
    """Return a signed margin: percentage points, or for an AUC four decimals."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:+.4f}" if metric == "attack_auc" else f"{value * 100:+.2f}{NBSP}pp"


def threshold(metric: str | None, text: str) -> str:
    """Return the gate's threshold with its ratios as percentages; any other text stays as it is."""
    match = _THRESHOLD.fullmatch(text)
    if metric is None or match is None:
        return text
    sign, value, tolerance = match.groups()
    parts = [_SIGNS[sign], number(metric, float(value))]
    if tolerance is not None:
        parts += ["±", margin(metric, float(tolerance)).removeprefix("+")]
    return " ".join(part for part in parts if part)


def count(value: int | None) -> str:
    """Return a count with thousands separated."""
    return MISSING if value is None else f"{value:,}"


def limits(forgotten: int, widest: tuple[str, float] | None, reference: bool) -> list[str]:
    """Return what the numbers cannot show, in plain words.

    Args:
        forgotten: samples in the forget set.
        widest: title and half width, as a ratio, of the widest 95 % interval.
        reference: whether a retrained model was measured.

    Returns:
        One sentence or two an item.
    """
    spread = (
        "No interval was measured."
        if widest is None
        else f"The widest 95 % interval ({widest[0]}) is ± {widest[1] * 100:.2f} points."
    )
    compared = (
        "The retrained reference is one training run with one seed; another would differ a little."
        if reference
        else "No retrained model was measured, so the distance to training without the data is not known."
    )
    return [
        "It attests that a procedure was applied and what was measured afterwards. It does not prove that nothing "
        "of the data is left: no test of the weights alone can (Thudi et al., arXiv 2110.11891).",
        "The membership attacks are population attacks, the weakest kind. They judge the set as a whole; a "
        "stronger attack made for one sample may still find it.",
        f"The forget set has {forgotten:,} samples. {spread} Differences smaller than that say nothing.",
        compared,
        "The intervals are of sampling only. They leave out how much a second run with another seed would change.",
        "High accuracy on the forget set is no failure by itself: a model that never saw a sample may get it right.",
    ]
