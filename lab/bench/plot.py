"""The picture of a suite: the distance of each row from the goal, against its cost."""

from __future__ import annotations

import re
import statistics
from typing import TYPE_CHECKING

from lab.bench.results import ORIGINAL, RETRAIN, ResultRow, Results, known
from salun_core.digest import sha256_bytes
from salun_core.report.plots import COLOURS, draw, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"saliency": COLOURS["after"], "random": COLOURS["forget"], "none": COLOURS["test"]}


def plot(results: Results) -> str:
    """Draw one point per row: cost on the x axis, average gap or the other classes' loss of accuracy on the y axis.

    Returns SVG. The cost is in seconds. With a search it is in passes, which are the same on every machine: a dot at
    the cost of the chosen run alone, a ring at its cost with the search.
    """
    gaps = any(known(row, "gap") for row in results.rows)
    points = [(row, *point) for row in results.rows if (point := _point(row, gaps, results.searched)) is not None]

    def paint(figure: Figure) -> str:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis = figure.subplots()
        for row, spent, height, ua in points:
            colour = COLOURS["reference"] if row.name == RETRAIN else _COLOURS[row.mask]
            passes = [item.passes for item in row.figures if item.own_passes is not None and item.passes is not None]
            if passes:
                whole = statistics.mean(passes)
                axis.plot([spent, whole], [height, height], "-", color=colour, linewidth=0.5, alpha=0.5)
                axis.plot([whole], [height], "o", color=colour, markersize=5, fillstyle="none")
            axis.plot([spent], [height], "o", color=colour, markersize=6)
            name = label(row.name) + ("" if gaps else f", UA {ua:.0f} %")
            axis.annotate(name, (spent, height), xytext=(5, 4), textcoords="offset points", fontsize=7.5)
        if points:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.2)
        top = max((height for _, _, height, _ in points), default=1.0) or 1.0
        axis.set_ylim(-0.05 * top, 1.15 * top)
        searched = results.searched
        axis.set_xlabel("passes: run alone, and with its search" if searched else "seconds of mask and unlearning")
        axis.set_ylabel("average gap to Retrain, points" if gaps else "100 - accuracy of the other classes, points")
        shown = (f"{spent:.0f} passes" if searched else f"{spent:.1f} s" for _, spent, _, _ in points)
        ends = [f"{row.name} {height:.2f} at {cost}" for (row, _, height, _), cost in zip(points, shown, strict=True)]
        return f"Distance from the goal against cost: {', '.join(ends)}."

    return standalone(draw(f"{results.suite}-{results.size}", 6.4, 4.0, paint), digest(results))


def standalone(drawn: str, note: str) -> str:
    """Return a picture of a page as a file of its own: with its colours, a white background, and a note."""
    plain = re.sub(r"var\(--\w+, (#\w+)\)", r"\1", drawn)
    return plain.replace(
        '<svg class="plot"', '<svg xmlns="http://www.w3.org/2000/svg" style="background:#ffffff"', 1
    ).replace(">", f"><!-- {note} -->", 1)


def digest(results: Results) -> str:
    """Return the digest that connects a page and a picture with the results that they were made from."""
    return sha256_bytes(results.model_dump_json().encode())


def _point(row: ResultRow, gaps: bool, searched: bool) -> tuple[float, float, float] | None:
    """Return mean cost of a row's run, height and UA, in points; None without cost or height."""
    passes = [item.own_passes or item.passes for item in row.figures]
    spent = [cost for cost in (passes if searched else known(row, "seconds")) if cost]
    accuracies = [value for item in row.figures if (value := item.values.get("RA")) is not None]
    heights = known(row, "gap") if gaps else [1 - accuracy for accuracy in accuracies]
    if row.name == ORIGINAL or not spent or not heights:
        return None
    ua = [100 * value for item in row.figures if (value := item.values.get("UA")) is not None]
    return statistics.mean(spent), statistics.mean(100 * height for height in heights), statistics.mean(ua or [0.0])
