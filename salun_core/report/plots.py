"""The pictures beside the histograms: plain data in, one SVG element out. No sample is ever shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from salun_core.report.svg import COLOURS, STATES, draw, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from salun_core.evaluation.evidence import ClassAccuracy, Curve, CurvePoint, EpochRecord

T = TypeVar("T")

_DASHES = {"before": (0, (4, 2)), "after": "solid", "reference": (0, (1, 1.2))}
MAX_CLASSES = 40
MAX_ROC_POINTS = 512


def class_accuracy(
    rows: Sequence[ClassAccuracy], forgotten: Sequence[int] = (), quantity: str = "test accuracy"
) -> str:
    """Draw each class's accuracy before and after, joined by a line; forgotten classes are marked.

    Args:
        rows: accuracy by class, as ratios; the `MAX_CLASSES` that changed most are drawn where there are more.
        forgotten: ids of classes that were forgotten as a whole.
        quantity: what the accuracy is of.

    Returns:
        The SVG element.
    """
    measured = [row for row in rows if change(row) is not None]
    changes = {row.class_id: change(row) or 0.0 for row in measured}
    kept = sorted(
        sorted(measured, key=lambda row: -abs(changes[row.class_id]))[:MAX_CLASSES], key=lambda row: row.class_id
    )

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        for place, row in enumerate(kept):
            _dumbbell(axis, place, row, COLOURS["forget" if row.class_id in forgotten else "after"])
        names = [label(row.name) + (" (forgotten)" if row.class_id in forgotten else "") for row in kept]
        axis.set_yticks(range(len(kept)), names)
        axis.set_ylim(len(kept) - 0.5, -0.5)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_xlabel(f"{quantity}: ○ before   ● after   (right: change in points)")
        axis.grid(axis="y", visible=False)
        ends = _extremes({row.name: changes[row.class_id] for row in kept}, "change")
        return f"{quantity.capitalize()} by class before and after. {ends}"

    return draw("classes", 5.0, 1.0 + 0.22 * max(len(kept), 8), paint)


def _dumbbell(axis: Axes, place: int, row: ClassAccuracy, colour: str) -> None:
    before, after = row.before or 0.0, row.after or 0.0
    axis.plot([before, after], [place, place], color=colour, linewidth=1.6, alpha=0.5, zorder=2)
    axis.plot([after], [place], "o", color=colour, markersize=6, zorder=4)
    axis.plot([before], [place], "o", color=COLOURS["before"], markersize=5, markerfacecolor="none", zorder=3)
    spot = (1.02, place)
    axis.annotate(
        f"{(after - before) * 100:+.1f}", spot, xycoords=axis.get_yaxis_transform(), va="center", fontsize=8.0
    )


def change(row: ClassAccuracy) -> float | None:
    """Return the change of a class's accuracy, or None where it was not measured."""
    if row.before is None or row.after is None or not math.isfinite(row.after - row.before):
        return None
    return row.after - row.before


def _extremes(values: Mapping[str, float], what: str) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"Lowest {what}: {label(low, 60)} {values[low]:+.1%}; highest: {label(high, 60)} {values[high]:+.1%}."


def roc(curves: Mapping[str, Curve]) -> str:
    """Draw the ROC of the membership attack for each model.

    Args:
        curves: by model: before, after, reference; more than `MAX_ROC_POINTS` points are thinned.

    Returns:
        The SVG element.
    """
    shown = {state: curves[state] for state in STATES if state in curves}

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, label="guessing, AUC 0.5000")
        for state, curve in shown.items():
            points = list(zip(curve.fpr, curve.tpr, strict=False))
            kept = thin(points, MAX_ROC_POINTS)
            title = f"{STATES[state].lower()}, AUC {curve.auc:.4f}"
            axis.plot(
                *zip(*kept, strict=True), color=COLOURS[state], linestyle=_DASHES[state], linewidth=1.8, label=title
            )
        axis.set(
            xlim=(0, 1),
            ylim=(0, 1.01),
            xlabel="false positive rate (test samples)",
            ylabel="true positive rate (forgotten samples)",
        )
        axis.legend(loc="lower right")
        return (
            "ROC of the membership attack. "
            + ", ".join(f"{state}: AUC {curve.auc:.4f}" for state, curve in shown.items())
            + "."
        )

    return draw("roc", 5.0, 3.6, paint)


def thin(points: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` points, evenly taken, the first and the last among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(place * (len(points) - 1) / (limit - 1))] for place in range(limit)]


def mask_density(by_parameter: Mapping[str, float], overall: float | None) -> str:
    """Draw the share of salient weights of each parameter, in the model's order, grouped by top-level block.

    Args:
        by_parameter: density by parameter name, as ratios.
        overall: density of the whole mask.

    Returns:
        The SVG element.
    """
    names, values = list(by_parameter), list(by_parameter.values())

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        axis.stairs(values, range(len(values) + 1), fill=True, color=COLOURS["after"], alpha=0.55, linewidth=0)
        if overall is not None:
            axis.axhline(overall, color=COLOURS["ink"], linewidth=1.0, linestyle=(0, (4, 2)))
            axis.set_title(f"– – whole mask {overall:.2%}", loc="right", fontsize=8.5, fontweight="normal")
        starts = [
            place for place in range(len(names)) if place == 0 or _block(names[place]) != _block(names[place - 1])
        ]
        shown = _spread(starts, len(names) / 18)
        axis.set_xticks(
            shown, [label(_block(names[start]), 14) for start in shown], rotation=35, ha="right", rotation_mode="anchor"
        )
        for start in starts[1:]:
            axis.axvline(start, color=COLOURS["grid"], linewidth=0.8)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set(xlim=(0, len(values)), ylim=(0, None), ylabel="salient weights")
        axis.grid(axis="x", visible=False)
        return f"Mask density of {len(values)} parameters. " + _extremes(by_parameter, "density").replace("+", "")

    return draw("mask", 5.0, 3.0, paint)


def _spread(places: Sequence[int], gap: float) -> list[int]:
    """Keep those places whose labels do not run into one another."""
    kept: list[int] = []
    for place in places:
        if not kept or place - kept[-1] >= gap:
            kept.append(place)
    return kept


def _block(name: str) -> str:
    return name.split(".", 1)[0]


def training(history: Sequence[EpochRecord]) -> str:
    """Draw the mean loss of each part of every epoch.

    Args:
        history: one record an epoch.

    Returns:
        The SVG element.
    """
    from matplotlib.ticker import MaxNLocator

    parts = sorted({part for record in history for part in record.losses})

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        ends = []
        for part in parts:
            points = [(record.epoch, record.losses[part]) for record in history if _drawable(record, part)]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=COLOURS.get(part, COLOURS["after"]),
                    markersize=4,
                    linewidth=1.6,
                    label=label(part),
                )
                ends.append(f"{part} from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="epoch", ylabel="mean loss")
        axis.legend(loc="best")
        return f"Mean loss over {len(history)} epochs: {'; '.join(ends)}."

    return draw("training", 5.0, 3.0, paint)


def _drawable(record: EpochRecord, part: str) -> bool:
    return part in record.losses and math.isfinite(record.losses[part])


def resurgence(points: Sequence[CurvePoint]) -> str:
    """Draw UA against the steps of fine-tuning on what was kept: a curve that falls shows the class coming back.

    Args:
        points: at least one with a finite UA, in any order.

    Returns:
        The SVG element.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = sorted((point.step, point.ua) for point in points if math.isfinite(point.ua))

    def paint(figure: Figure) -> str:
        axis = figure.subplots()
        steps, values = zip(*drawn, strict=True)
        axis.plot(steps, values, "o-", color=COLOURS["forget"], markersize=4, linewidth=1.6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set(ylim=(0, 1.03), xlabel="steps of fine-tuning on what was kept", ylabel="UA")
        return f"UA by steps of fine-tuning: {', '.join(f'{ua:.1%} at {step:,}' for step, ua in thin(drawn, 12))}."

    return draw("resurgence", 5.0, 3.0, paint)
