"""Differences between both sides over the seeds, and whether they exceed the seeds' spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.studies.deviations.stage import METRICS

_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, 97.5 %


@dataclass(frozen=True)
class Difference:
    """Of one metric, theirs minus ours, paired by seed, in points. `values` has one per seed."""

    ours: float
    theirs: float
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Of the seeds' differences."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """Their standard deviation."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def seen(self) -> bool:
        """Whether the 95 % interval of the mean (Student's t) excludes 0 and the mean is at least 0.1 points."""
        count = len(self.values)
        quantile = _QUANTILES.get(count, 2.23)
        return count > 1 and abs(self.mean) >= 0.1 and abs(self.mean) > quantile * self.spread / math.sqrt(count)

    @property
    def unclear(self) -> bool:
        """Whether it exceeds the seeds' spread without being seen."""
        return not self.seen and abs(self.mean) >= 0.1 and abs(self.mean) > self.spread

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.spread:.1f}".replace("-", "−")


def best(cells: Mapping[str, Any], prefix: str) -> tuple[str, Mapping[str, Sequence[float]]]:
    """Return the variant with the smallest mean gap among those whose name has the prefix."""
    found = {name: values for name, values in cells.items() if name == prefix or name.startswith(prefix + " ")}
    return min(found.items(), key=lambda item: statistics.mean(item[1]["gap"]))


def differences(cells: Mapping[str, Any], what: str) -> dict[str, Difference]:
    """Compare both sides of one method, each at its best rate, by metric; cells hold lists by variant and metric."""
    (_, ours), (_, theirs) = best(cells, f"ours {what}"), best(cells, f"theirs {what}")
    return {
        metric: Difference(
            100 * statistics.mean(ours[metric]),
            100 * statistics.mean(theirs[metric]),
            [100 * (right - left) for left, right in zip(ours[metric], theirs[metric], strict=True)],
        )
        for metric in METRICS
    }


def subjects(cells: Mapping[str, Any]) -> list[str]:
    """Return the subjects that both sides were measured on: methods, or the original."""
    return list(dict.fromkeys(name.split()[1] for name in cells))


def table(document: Mapping[str, Any]) -> str:
    """Render all comparisons, theirs minus ours in points; a star if the 95 % interval excludes 0."""
    lines = ["| difference | of | best of ours, theirs | " + " | ".join(METRICS) + " |", "|---" * 8 + "|"]
    for name, found in document["deviations"].items():
        cells = found["cells"]
        for what in subjects(cells):
            rates = ", ".join(best(cells, f"{side} {what}")[0].split()[-1] for side in ("ours", "theirs"))
            row = [f"{value}{' *' * value.seen}" for value in differences(cells, what).values()]
            lines.append(
                " | ".join([f"| {name}", what, rates if any(c in rates for c in "0123456789") else "-", *row]) + " |"
            )
        lines += [f"| {name} | {fact} | {statistics.mean(values):.4g} |" for fact, values in found["facts"].items()]
    return "\n".join(lines)
