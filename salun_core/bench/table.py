"""The table of a suite in Markdown: mean ± standard deviation over the seeds, as the papers print it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from salun_core.bench.results import RETRAIN, Figures, Results, Row, Setting
from salun_core.report.wording import UNITS

MISSING, AS_WRITTEN = "–", "as written"
_FIRST = ("learning_rate", "density", "epochs")
_SOMETIMES = {"own_passes": "of which the chosen run", "runs": "runs", "debt": "debt"}
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
    known = {name: _known(name, results) for name in ("own_passes", "runs", "debt")}
    gaps = results.kind == "classification" and reference is not None
    metrics = results.metrics
    titles = ["method", *(_title(name) for name in metrics), *(["avg. gap"] if gaps else []), "RTE, s", "passes"]
    titles += [title for name, title in _SOMETIMES.items() if known[name]]
    lines = [_line(titles), "|---" + "|--:" * (len(titles) - 1) + "|"]
    for row in results.rows:
        cells = [_shown(name, row, reference) for name in metrics]
        if gaps:
            cells.append(spread([100 * item.gap for item in row.figures if item.gap is not None], 2))
        cells.append(spread([item.seconds for item in row.figures if item.seconds is not None], 1))
        passes = [item.passes for item in row.figures if item.passes is not None]
        cells.append(f"{statistics.mean(passes):,.0f}" if passes else MISSING)
        cells += [_sometimes(name, row) for name in _SOMETIMES if known[name]]
        lines.append(_line([_name(row), *cells]))
    return "\n".join(lines)


def choices(results: Results) -> str:
    """Render which settings the searches picked, by row and seed; nothing where nothing was searched for.

    Args:
        results: of one suite and size.
    """
    rows = [row for row in results.rows if row.method is not None] if results.searched else []
    if not rows:
        return ""
    seeds = sorted({item.seed for row in rows for item in row.figures})
    lines = [_line(["chosen settings", *(f"seed {seed}" for seed in seeds), "trials"]), "|---" * (len(seeds) + 2) + "|"]
    for row in rows:
        found = {item.seed: _picked(row, item) for item in row.figures}
        tried = [item.tried for item in row.figures if item.tried is not None]
        trials = f"{statistics.mean(tried):.3g}" if tried else MISSING
        lines.append(_line([_name(row), *(found.get(seed, MISSING) for seed in seeds), trials]))
    return "\n".join(lines)


def _picked(row: Row, item: Figures) -> str:
    if item.chosen is None:
        return AS_WRITTEN
    names = [name for name in _FIRST if name in item.chosen]
    names += sorted(set(item.chosen) - set(names))
    values = {name: value if isinstance(value, list) else [value] for name, value in item.chosen.items()}
    return ", ".join(_setting(name, values[name]) for name in names)


def _setting(name: str, values: Sequence[Setting]) -> str:
    shown = [value if isinstance(value, str) else f"{value:g}" for value in values]
    same = shown[:1] if len(set(shown)) == 1 else shown
    return f"{'lr' if name == 'learning_rate' else name} {' → '.join(same)}"


def _known(name: str, results: Results) -> bool:
    return any(getattr(item, name) is not None for row in results.rows for item in row.figures)


def _sometimes(name: str, row: Row) -> str:
    values = [value for item in row.figures if (value := getattr(item, name)) is not None]
    if not values:
        return MISSING
    mean = statistics.mean(values)
    return f"{100 * mean:.2f} %" if name == "debt" else f"{mean:,.0f}"


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
