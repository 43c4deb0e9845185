"""The table of a suite in Markdown: mean ± standard deviation over the seeds, as the papers print it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from salun_core.bench.results import RETRAIN, Results, Row
from salun_core.report.wording import UNITS

MISSING = "–"
_DECIMALS = {"FID": 2, "KID": 4, "CLIP": 2}
_WORDS = {"neighbours": "near classes", "UA_relearned": "UA after fine-tuning", "attack_success": "prompt attack"}


def table(results: Results) -> str:
    """Render the table.

    Shares are in percent. Where there is a retrained model, the distance to it stands in parentheses: the mean over
    the seeds of each seed's own distance, so that the average gap is the mean of the parentheses.

    Args:
        results: of one suite and size.
    """
    reference = next((row for row in results.rows if row.name == RETRAIN), None)
    gaps = results.kind == "classification" and reference is not None
    metrics = results.metrics
    titles = ["method", *(_title(name) for name in metrics), *(["avg. gap"] if gaps else []), "RTE, s", "passes"]
    lines = [_line(titles), "|---" + "|--:" * (len(titles) - 1) + "|"]
    for row in results.rows:
        cells = [_shown(name, row, reference) for name in metrics]
        if gaps:
            cells.append(spread([100 * item.gap for item in row.figures if item.gap is not None], 2))
        cells.append(spread([item.seconds for item in row.figures if item.seconds is not None], 1))
        passes = [item.passes for item in row.figures if item.passes is not None]
        cells.append(f"{statistics.mean(passes):,.0f}" if passes else MISSING)
        lines.append(_line([_name(row), *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _title(metric: str) -> str:
    return _WORDS.get(metric, metric)


def _name(row: Row) -> str:
    name = row.name.replace("|", "\\|")
    return f"{name} ({row.density:.0%})" if row.density is not None and f"{row.density:.0%}" not in name else name


def _shown(metric: str, row: Row, reference: Row | None) -> str:
    scale = 1 if metric in UNITS else 100
    values = {item.seed: item.values.get(metric) for item in row.figures}
    known = {seed: value * scale for seed, value in values.items() if value is not None and math.isfinite(value)}
    text = spread(list(known.values()), _DECIMALS.get(metric, 2))
    if reference is None or row.name == RETRAIN or not known:
        return text
    wanted = {item.seed: item.values.get(metric) for item in reference.figures}
    gaps = [abs(value - scale * other) for seed, value in known.items() if (other := wanted.get(seed)) is not None]
    return f"{text} ({statistics.mean(gaps):.{_DECIMALS.get(metric, 2)}f})" if gaps else text


def spread(values: Sequence[float], decimals: int) -> str:
    """Return mean ± standard deviation; of one value alone the value."""
    if not values:
        return MISSING
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"
