"""The picture that convinces: how sure each model is of forgotten, kept and unseen samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from salun_core.report.svg import COLOURS, STATES, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from salun_core.evaluation.evidence import Distribution, Series

SPLITS = ("retain", "test", "forget")
_SPIKE = 0.4  # one bin with more than this share hides all others on a linear scale


def distributions(quantity: str, data: Distribution) -> str:
    """Draw the histograms of the splits before, after and for the reference, side by side.

    Args:
        quantity: what is counted, such as `loss`.
        data: common bins and the counts by split and model.

    Returns:
        The SVG element.
    """
    states = [state for state in STATES if any(_counts(series, state) for series in data.splits.values())]

    def paint(figure: Figure) -> str:
        axes = figure.subplots(1, len(states), sharex=True, sharey=True, squeeze=False)[0]
        heights = [
            share for state in states for split in data.splits.values() for share in shares(_counts(split, state))
        ]
        for axis, state in zip(axes, states, strict=True):
            _histograms(axis, data, state)
            _scales(axis, data.edges, max(heights, default=0.0))
            axis.set_xlabel(quantity)
        root = max(heights, default=0.0) > _SPIKE
        axes[0].set_ylabel("share of samples per bin" + (" (root scale)" if root else ""))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(names))
        return f"Histograms of {quantity} by split. " + " ".join(_describe(data, state) for state in states)

    return draw(f"dist{quantity}", 10.2, 2.9, paint)


def shares(counts: Sequence[int]) -> list[float]:
    """Return each bin's share of the counts; zeros where there are none."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def overlap(data: Distribution, state: str, first: str = "forget", second: str = "test") -> float | None:
    """Return the area that two splits' histograms share: 1 when they cannot be told apart, else less.

    Returns:
        The sum over bins of the smaller share, or None where a split has no counts.
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
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.minorticks_off()
    if highest > _SPIKE:
        axis.set_yscale("function", functions=(_root, _square))
        axis.set_yticks([tick for tick in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0) if tick <= 1.2 * highest])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_ylim(bottom=0)
    axis.set_xlim(edges[0], edges[-1])


def is_geometric(edges: Sequence[float]) -> bool:
    """Return whether bins grow by a constant factor, so that a logarithmic axis shows them evenly."""
    if len(edges) < 3 or edges[0] <= 0:
        return False
    first = edges[1] / edges[0]
    return first > 1.001 and all(
        math.isclose(b / a, first, rel_tol=1e-3) for a, b in zip(edges, edges[1:], strict=False)
    )


def _root(values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - arrays, called by matplotlib
    import numpy as np

    return np.sqrt(np.maximum(values, 0.0))


def _square(values):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - arrays, called by matplotlib
    return values * values


def _describe(data: Distribution, state: str) -> str:
    medians = [
        f"{split} {_median(data.edges, _counts(data.splits[split], state))}" for split in SPLITS if split in data.splits
    ]
    return f"{STATES[state]}: medians near {', '.join(medians)}."


def _median(edges: Sequence[float], counts: Sequence[int]) -> str:
    reached, half = 0, sum(counts) / 2
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        reached += count
        if count and reached >= half:
            return f"{(low + high) / 2:.3g}"
    return "none"
