"""The picture of a suite: how far each row is from the goal, against what it cost."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from salun_core.bench.results import ORIGINAL, RETRAIN, Figures, Results, Row
from salun_core.digest import sha256_bytes
from salun_core.report.plots import COLOURS, draw, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SECONDS = ("seconds of mask and unlearning", "s")
_COLOURS = {"saliency": COLOURS["after"], "random": COLOURS["forget"], "none": COLOURS["test"]}


def plot(results: Results) -> str:
    """Draw one point a row: the cost to the right, upwards the average gap, or what the other classes lose.

    The cost is in seconds; where settings were searched for, in passes, which are the same on every machine: a dot
    at what the chosen run alone costs, a ring at its cost with the search.

    Args:
        results: of one suite and size.

    Returns:
        An SVG file.
    """
    gaps = any(item.gap is not None for row in results.rows for item in row.figures)
    points = [(row, *point) for row in results.rows if (point := _point(row, gaps, results.searched)) is not None]
    cost, unit = ("passes: run alone, and with its search", "passes") if results.searched else _SECONDS

    def paint(figure: Figure) -> str:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis = figure.subplots()
        for row, spent, height, ua in points:
            whole = _mean([item.passes for item in row.figures if item.own_passes is not None])
            if whole is not None:
                axis.plot([spent, whole], [height, height], "-", color=_colour(row), linewidth=0.5, alpha=0.5)
                axis.plot([whole], [height], "o", color=_colour(row), markersize=5, fillstyle="none")
            axis.plot([spent], [height], "o", color=_colour(row), markersize=6)
            said = label(row.name) + ("" if gaps else f", UA {ua:.0f} %")
            axis.annotate(said, (spent, height), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
        if points:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.2)
        top = max((height for _, _, height, _ in points), default=1.0) or 1.0
        axis.set_ylim(-0.05 * top, 1.15 * top)
        axis.set_xlabel(cost)
        axis.set_ylabel("average gap to Retrain, points" if gaps else "100 - accuracy of the other classes, points")
        digits = 0 if results.searched else 1
        ends = ", ".join(f"{row.name} {height:.2f} at {spent:.{digits}f} {unit}" for row, spent, height, _ in points)
        return f"Distance from the goal against cost: {ends}."

    drawn = draw(f"{results.suite}-{results.size}", 6.4, 4.0, paint)
    plain = re.sub(r"var\(--\w+, (#\w+)\)", r"\1", drawn)
    return plain.replace(
        '<svg class="plot"', '<svg xmlns="http://www.w3.org/2000/svg" style="background:#ffffff"', 1
    ).replace(">", f"><!-- {digest(results)} -->", 1)


def digest(results: Results) -> str:
    """Return the digest by which a page and a picture say which results they were made from."""
    return sha256_bytes(results.model_dump_json().encode())


def _colour(row: Row) -> str:
    return COLOURS["reference"] if row.name == RETRAIN else _COLOURS[row.mask]


def _point(row: Row, gaps: bool, passes: bool) -> tuple[float, float, float] | None:
    """Return mean cost of a row's run, height and UA, in points; None where it has none of them."""
    spent = [float(cost) for item in row.figures if (cost := _cost(item, passes))]
    heights = [
        100 * value for item in row.figures if (value := item.gap if gaps else _lost(item.values.get("RA"))) is not None
    ]
    if row.name == ORIGINAL or not spent or not heights:
        return None
    ua = [100 * value for item in row.figures if (value := item.values.get("UA")) is not None]
    return statistics.mean(spent), statistics.mean(heights), statistics.mean(ua) if ua else 0.0


def _cost(item: Figures, passes: bool) -> float | None:
    return (item.own_passes or item.passes) if passes else item.seconds


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _lost(accuracy: float | None) -> float | None:
    return None if accuracy is None else 1 - accuracy
