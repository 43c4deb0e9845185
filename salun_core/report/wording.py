"""Words and number formats of the report: a ratio in JSON is a percentage with two decimals on the page.

An AUC, a divergence, a distance (FID, KID) and a CLIP score are not ratios and keep their own unit.
"""

from __future__ import annotations

import math
import re

from salun_core.evaluation.metrics import ADDED, MetricRow, Unit, find_row, rows_of

MISSING = "–"
NBSP = "\N{NO-BREAK SPACE}"
_THRESHOLD = re.compile(r"(?:(<=|>=|within|inside) )?(-?\d+\.\d+)(?: ± (\d+\.\d+))?")
_SIGNS = {"<=": "≤ ", ">=": "≥ ", "within": "within ", "inside": "wholly within ", None: ""}


def words(metric: str, generated: bool = False) -> MetricRow:
    """Return title and meaning of a metric, of generated images or of a classifier; an unknown one keeps its name."""
    found = rows_of(generated).get(metric) or ADDED.get(metric)
    return found if found is not None and found.title else MetricRow(name=metric, title=metric)


def unit_of(metric: str | None) -> Unit | None:
    """Return the unit of a metric; None for a ratio."""
    found = find_row(metric) or ADDED.get(metric or "")
    return found.unit if found else None


def number(metric: str | None, value: float | None, sign: str = "") -> str:
    """Return a value as the page shows it: a percentage, or in the metric's unit.

    A value that is missing or not finite is a dash. `metric` is None for a plain ratio; the sign `+` marks a margin,
    which is in percentage points.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    unit = unit_of(metric)
    return f"{value:{sign}.{unit.decimals}f}" if unit else f"{value * 100:{sign}.2f}{NBSP}{'pp' if sign else '%'}"


def margin(metric: str | None, value: float | None) -> str:
    """Return a signed margin: percentage points, or in the metric's unit."""
    return number(metric, value, "+")


def interval(metric: str, low: float | None, high: float | None) -> str:
    """Return a 95 % interval in brackets; empty without one."""
    ends = number(metric, low).removesuffix(f"{NBSP}%"), number(metric, high)
    return "" if MISSING in ends else f"[{ends[0]}, {ends[1]}]"


def threshold(metric: str | None, text: str) -> str:
    """Return the gate's threshold with its ratios as percentages; any other text is unchanged."""
    match = _THRESHOLD.fullmatch(text)
    if metric is None or match is None:
        return text
    sign, value, tolerance = match.groups()
    shown = _SIGNS[sign] + number(metric, float(value))
    return f"{shown} ± {margin(metric, float(tolerance)).removeprefix('+')}" if tolerance is not None else shown


def count(value: int | None) -> str:
    """Return a count with a separator for thousands."""
    return MISSING if value is None else f"{value:,}"
