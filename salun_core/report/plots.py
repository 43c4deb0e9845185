"""The figures of the report: plain data in, one SVG element out. No sample is shown."""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar
from xml.sax.saxutils import quoteattr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from salun_core.evaluation.evidence import ClassAccuracy, Curve, CurvePoint, Distribution, EpochRecord, Series

T = TypeVar("T")

# Blue, vermilion and green of Okabe and Ito stay distinguishable for every common colour blindness. Each colour becomes
# a CSS variable of the page, so that one picture serves the light and the dark theme.
COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636f",
    "grid": "#d8dee5",
    "forget": "#d55e00",
    "retain": "#009e73",
    "test": "#0072b2",
    "before": "#818b98",
    "after": "#6f42c1",
    "reference": "#9a6700",
}
STATES = {"before": "Before", "after": "After", "reference": "Retrained reference"}
SPLITS = ("retain", "test", "forget")
MAX_CLASSES = 40
MAX_ROC_POINTS = 512
_DASHES = {"before": (0, (4, 2)), "after": "solid", "reference": (0, (1, 1.2))}
_PERCENT = "{x:.0%}"
_SPIKE = 0.4  # one bin with more than this share hides all others on a linear scale
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called `$`
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": True,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_TAG = re.compile(r"<[^>]+>")  # matplotlib escapes `>` in text, so that a class name is never taken for a tag


def draw(name: str, width: float, height: float, paint: Callable[[Figure], str]) -> str:
    """Draw one picture of a size in inches: an `<svg>` element with `role="img"` and the alternative text as its label.

    `name` is unique in the page, so that the ids of two pictures differ. `paint` puts the axes on the figure and
    returns the alternative text.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = _STYLE | {
        "svg.hashsalt": name
    }  # ids of clip paths and markers: the same in each run, others in each picture
    with mpl.rc_context(style), warnings.catch_warnings():  # type: ignore[arg-type]  # keys are a Literal there
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser has its own fonts
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
        FigureCanvasSVG(figure)
        alt = paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    document = buffer.getvalue().decode("utf-8")
    size = re.search(r'viewBox="([^"]+)"', document)
    assert size is not None, "matplotlib writes a viewBox"
    body = document[document.index(">", document.index("<svg")) + 1 :]
    body = _TAG.sub(lambda tag: _adapted(tag.group()), re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL))
    inner = re.sub(r">\s+<", "><", body).strip()
    return f'<svg class="plot" role="img" aria-label={quoteattr(alt)} viewBox="{size.group(1)}">{inner}'


def _adapted(tag: str) -> str:
    """Remove what HTML does not need from a tag, and turn its colours into variables of the page."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)  # names of axes and ticks, equal in every picture
    tag = tag.replace('xlink:href="#', 'href="#').replace("\n", " ")
    tag = re.sub(r"font-family: [^;\"]+;? ?", "", tag)
    for colour, value in COLOURS.items():
        tag = tag.replace(value, f"var(--{colour}, {value})")
    return tag


def label(text: str, limit: int = 22) -> str:
    """Return a name that fits an axis: without control or direction characters, shortened to `limit` characters."""
    visible = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in text)
    return visible if len(visible) <= limit else visible[: limit - 1] + "…"


def distributions(quantity: str, data: Distribution) -> str:
    """Draw the histograms of a quantity of the splits before, after and for the reference, side by side."""
    states = [state for state in STATES if any(_counts(series, state) for series in data.splits.values())]
    highest = max(
        (share for state in states for split in data.splits.values() for share in shares(_counts(split, state))),
        default=0.0,
    )

    def paint(figure: Figure) -> str:
        axes = figure.subplots(1, len(states), sharex=True, sharey=True, squeeze=False)[0]
        for axis, state in zip(axes, states, strict=True):
            _histograms(axis, data, state)
            _scales(axis, data.edges, highest)
            axis.set_xlabel(quantity)
        axes[0].set_ylabel("share of samples per bin" + (" (root scale)" if highest > _SPIKE else ""))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(names))
        medians = {
            state: ", ".join(
                f"{split} {_median(data.edges, _counts(data.splits[split], state))}"
                for split in SPLITS
                if split in data.splits
            )
            for state in states
        }
        return f"Histograms of {quantity} by split. " + " ".join(
            f"{STATES[state]}: medians near {text}." for state, text in medians.items()
        )

    return draw(f"dist{quantity}", 10.2, 2.9, paint)


def shares(counts: Sequence[int]) -> list[float]:
    """Return each bin's share of the counts; zeros if all counts are zero."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def overlap(data: Distribution, state: str, first: str = "forget", second: str = "test") -> float | None:
    """Return the area that two splits' histograms share: 1 if they cannot be told apart, else less.

    It is the sum over bins of the smaller share, or None if a split has no counts.
    """
    pair = [_counts(data.splits[split], state) if split in data.splits else [] for split in (first, second)]
    if not all(sum(counts) for counts in pair):
        return None
    return math.fsum(map(min, shares(pair[0]), shares(pair[1])))


def _counts(series: Series, state: str) -> list[int]:
    counts: list[int] | None = getattr(series, state)
    return counts or []


def _histograms(axis: Axes, data: Distribution, state: str) -> None:
    for split in (name for name in SPLITS if name in data.splits):
        values = shares(_counts(data.splits[split], state))
        if not values:
            continue
        colour, width = COLOURS[split], 1.8 if split == "forget" else 1.2
        axis.stairs(values, data.edges, fill=True, color=colour, alpha=0.10 if split == "retain" else 0.22, linewidth=0)
        axis.stairs(values, data.edges, color=colour, linewidth=width, label=split)
    common = overlap(data, state)
    axis.set_title(STATES[state])
    if common is not None:
        axis.set_title(f"forget ∩ test {common:.1%}", loc="right", fontsize=8.5, fontweight="normal")


def _scales(axis: Axes, edges: Sequence[float], highest: float) -> None:
    if is_geometric(edges):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    if highest > _SPIKE:
        axis.set_yscale("function", functions=(_root, _square))
        axis.set_yticks([tick for tick in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0) if tick <= 1.2 * highest])
    axis.yaxis.set_major_formatter(_PERCENT)
    axis.set_ylim(bottom=0)
    axis.set_xlim(edges[0], edges[-1])


def is_geometric(edges: Sequence[float]) -> bool:
    """Return whether bins grow by a constant factor, so that a logarithmic axis shows them evenly."""
    if len(edges) < 3 or edges[0] <= 0:
        return False
    first = edges[1] / edges[0]
    return first > 1.001 and all(math.isclose(b / a, first, rel_tol=1e-3) for a, b in pairwise(edges))


def _root(values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - arrays, called by matplotlib
    import numpy as np

    return np.sqrt(np.maximum(values, 0.0))


def _square(values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - arrays, called by matplotlib
    return values * values


def _median(edges: Sequence[float], counts: Sequence[int]) -> str:
    reached, half = 0, sum(counts) / 2
    for (low, high), count in zip(pairwise(edges), counts, strict=False):
        reached += count
        if count and reached >= half:
            return f"{(low + high) / 2:.3g}"
    return "none"


def class_accuracy(
    rows: Sequence[ClassAccuracy], forgotten: Sequence[int] = (), quantity: str = "test accuracy"
) -> str:
    """Draw each class's accuracy (a ratio) before and after, joined by a line; forgotten classes are marked.

    Only the `MAX_CLASSES` that changed most are drawn.
    """
    measured = [row for row in rows if change(row) is not None]
    most = sorted(measured, key=lambda row: -abs(change(row) or 0.0))[:MAX_CLASSES]
    kept = sorted(most, key=lambda row: row.class_id)

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        for place, row in enumerate(kept):
            _dumbbell(axis, place, row, COLOURS["forget" if row.class_id in forgotten else "after"])
        names = [label(row.name) + (" (forgotten)" if row.class_id in forgotten else "") for row in kept]
        axis.set_yticks(range(len(kept)), names)
        axis.set_ylim(len(kept) - 0.5, -0.5)
        axis.xaxis.set_major_formatter(_PERCENT)
        axis.set_xlabel(f"{quantity}: ○ before   ● after   (right: change in points)")
        axis.grid(axis="y", visible=False)
        ends = _extremes({row.name: change(row) or 0.0 for row in kept}, "change")
        return f"{quantity.capitalize()} by class before and after. {ends}"

    return draw("classes", 5.0, 1.0 + 0.22 * max(len(kept), 8), paint)


def _dumbbell(axis: Axes, place: int, row: ClassAccuracy, colour: str) -> None:
    before, after = row.before or 0.0, row.after or 0.0
    axis.plot([before, after], [place, place], color=colour, linewidth=1.6, alpha=0.5, zorder=2)
    axis.plot([after], [place], "o", color=colour, markersize=6, zorder=4)
    axis.plot([before], [place], "o", color=COLOURS["before"], markersize=5, markerfacecolor="none", zorder=3)
    spot, text = (1.02, place), f"{(after - before) * 100:+.1f}"
    axis.annotate(text, spot, xycoords=axis.get_yaxis_transform(), va="center", fontsize=8.0)


def change(row: ClassAccuracy) -> float | None:
    """Return the change of a class's accuracy, or None if it was not measured."""
    if row.before is None or row.after is None or not math.isfinite(row.after - row.before):
        return None
    return row.after - row.before


def _extremes(values: Mapping[str, float], what: str) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"Lowest {what}: {label(low, 60)} {values[low]:+.1%}; highest: {label(high, 60)} {values[high]:+.1%}."


def roc(curves: Mapping[str, Curve]) -> str:
    """Draw the ROC of the membership attack for each model; more than `MAX_ROC_POINTS` points are thinned."""
    shown = {state: curves[state] for state in STATES if state in curves}

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, label="guessing, AUC 0.5000")
        for state, curve in shown.items():
            points = thin(list(zip(curve.fpr, curve.tpr, strict=False)), MAX_ROC_POINTS)
            name = f"{STATES[state].lower()}, AUC {curve.auc:.4f}"
            axis.plot(*zip(*points, strict=True), color=COLOURS[state], ls=_DASHES[state], linewidth=1.8, label=name)
        axis.set(xlim=(0, 1), ylim=(0, 1.01))
        axis.set(xlabel="false positive rate (test samples)", ylabel="true positive rate (forgotten samples)")
        axis.legend(loc="lower right")
        areas = ", ".join(f"{state}: AUC {curve.auc:.4f}" for state, curve in shown.items())
        return f"ROC of the membership attack. {areas}."

    return draw("roc", 5.0, 3.6, paint)


def thin(points: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` points, evenly chosen, including the first and the last."""
    if len(points) <= limit:
        return list(points)
    return [points[round(place * (len(points) - 1) / (limit - 1))] for place in range(limit)]


def mask_density(by_parameter: Mapping[str, float], overall: float | None) -> str:
    """Draw the share of salient weights of each parameter, in the model's order, grouped by top-level block."""
    values = list(by_parameter.values())
    blocks = [name.split(".", 1)[0] for name in by_parameter]
    starts = [place for place in range(len(blocks)) if place == 0 or blocks[place] != blocks[place - 1]]

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        axis.stairs(values, range(len(values) + 1), fill=True, color=COLOURS["after"], alpha=0.55, linewidth=0)
        if overall is not None:
            axis.axhline(overall, color=COLOURS["ink"], linewidth=1.0, linestyle=(0, (4, 2)))
            axis.set_title(f"– – whole mask {overall:.2%}", loc="right", fontsize=8.5, fontweight="normal")
        shown = _spread(starts, len(blocks) / 18)
        names = [label(blocks[start], 14) for start in shown]
        axis.set_xticks(shown, names, rotation=35, ha="right", rotation_mode="anchor")
        for start in starts[1:]:
            axis.axvline(start, color=COLOURS["grid"], linewidth=0.8)
        axis.yaxis.set_major_formatter(_PERCENT)
        axis.set(xlim=(0, len(values)), ylim=(0, None), ylabel="salient weights")
        axis.grid(axis="x", visible=False)
        return f"Mask density of {len(values)} parameters. " + _extremes(by_parameter, "density").replace("+", "")

    return draw("mask", 5.0, 3.0, paint)


def _spread(places: Sequence[int], gap: float) -> list[int]:
    """Keep the places whose labels do not overlap."""
    kept: list[int] = []
    for place in places:
        if not kept or place - kept[-1] >= gap:
            kept.append(place)
    return kept


def training(history: Sequence[EpochRecord]) -> str:
    """Draw the mean loss of each phase of every epoch."""
    phases = sorted({phase for record in history for phase in record.losses})

    def paint(figure: Figure) -> str:
        axis, ends = figure.subplots(), []
        for phase in phases:
            found = [(record.epoch, record.losses[phase]) for record in history if phase in record.losses]
            points = [(epoch, loss) for epoch, loss in found if math.isfinite(loss)]
            if points:
                _line(axis, points, COLOURS.get(phase, COLOURS["after"]), label(phase))
                ends.append(f"{phase} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        axis.set(xlabel="epoch", ylabel="mean loss")
        axis.legend(loc="best")
        return f"Mean loss over {len(history)} epochs: {'; '.join(ends)}."

    return draw("training", 5.0, 3.0, paint)


def resurgence(points: Sequence[CurvePoint]) -> str:
    """Draw UA against the steps of fine-tuning on retained data: a curve that falls shows the class coming back.

    At least one point must have a finite UA; the order does not matter.
    """
    drawn = sorted((point.step, point.ua) for point in points if math.isfinite(point.ua))

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        _line(axis, drawn, COLOURS["forget"])
        axis.yaxis.set_major_formatter(_PERCENT)
        axis.set(ylim=(0, 1.03), xlabel="steps of fine-tuning on retained data", ylabel="UA")
        return f"UA by steps of fine-tuning: {', '.join(f'{ua:.1%} at {step:,}' for step, ua in thin(drawn, 12))}."

    return draw("resurgence", 5.0, 3.0, paint)


def _line(axis: Axes, points: Sequence[tuple[int, float]], colour: str, name: str | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.6, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
