"""Results in Markdown: the table of a suite, and the page of all suites, made from the results' JSON alone.

The page has one section per suite and size, between markers; text outside the markers is left as it is.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from lab.bench.plot import digest, plot
from lab.bench.results import (
    FORMAT,
    RETRAIN,
    TIE,
    Figures,
    ResultRow,
    Results,
    Setting,
    difference,
    gaps_of,
    known,
    smallest,
)
from salun_core.config import parse, read_document
from salun_core.errors import ConflictError, UsageError
from salun_core.report.wording import MISSING, unit_of
from salun_core.storage.local_files import write_whole

AS_WRITTEN = "as written"
IMAGES = "images"
AGAINST = "Retrain against Retrain"
BEHIND = "behind the smallest, 95 %"
_BEGIN = re.compile(r"<!-- suite:([a-z0-9-]+):(cpu|paper) -->")
_FIRST = ("method", "learning_rate", "density", "epochs")
_OPTIONAL_COLUMNS = {"own_passes": "of which the chosen run", "runs": "runs", "debt": "debt"}
_TITLES = {"neighbours": "near classes", "UA_relearned": "UA after fine-tuning", "attack_success": "prompt attack"}


def table(results: Results) -> str:
    """Render the table of one suite and size: mean ± standard deviation over the seeds.

    Ratios are in percent. With retrained models, the distance to them is in parentheses: the mean over the seeds of
    each seed's own distances, so that the average gap is the mean of the parentheses. The smallest average gap is bold,
    together with the rows that are tied with it.
    """
    reference = next((row for row in results.rows if row.name == RETRAIN), None)
    gaps = results.kind == "classification" and reference is not None
    figures = [item for row in results.rows for item in row.figures]
    optional = [name for name in _OPTIONAL_COLUMNS if any(getattr(item, name) is not None for item in figures)]
    titles = ["method", *(_TITLES.get(name, name) for name in results.metrics)]
    compared = _behind(results) if gaps else {}
    titles += [*(["avg. gap"] if gaps else []), *([BEHIND] if compared else [])]
    titles += ["RTE, s", "passes", *(_OPTIONAL_COLUMNS[name] for name in optional)]
    lines = [_line(titles), "|---" + "|--:" * (len(titles) - 1) + "|"]
    for row in results.rows:
        cells = [_name(row), *(_metric(name, row, reference) for name in results.metrics)]
        if gaps:
            gap = _spread([100 * gap for gap in known(row, "gap")], 2)
            cells.append(f"**{gap}**" if row.name in results.best else gap)
        if compared:
            cells.append(compared.get(row.name, MISSING))
        cells.append(_spread(known(row, "seconds"), 1))
        cells += [_mean(known(row, name), "debt" if name == "debt" else "") for name in ("passes", *optional)]
        lines.append(_line(cells))
    return "\n".join(lines)


def _behind(results: Results) -> dict[str, str]:
    """Return each method's difference from the smallest average gap with its paired interval; empty with one seed."""
    gaps = {row.name: found for row in results.rows if row.method is not None and (found := gaps_of(row))}
    if not gaps:
        return {}
    best, shown = smallest(gaps), {}
    for name, of in gaps.items():
        mean, interval = difference(of, gaps[best])
        if name != best and mean is not None and interval is not None:
            shown[name] = f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
    return shown


def choices(results: Results) -> str:
    """Render which configurations the searches chose, by row and seed; empty without a search."""
    rows = [row for row in results.rows if row.method is not None] if results.searched else []
    if not rows:
        return ""
    seeds = sorted({item.seed for row in rows for item in row.figures})
    lines = [_line(["chosen settings", *(f"seed {seed}" for seed in seeds), "trials"]), "|---" * (len(seeds) + 2) + "|"]
    for row in rows:
        found, tried = {item.seed: _chosen(item) for item in row.figures}, known(row, "tried")
        trials = f"{statistics.mean(tried):.3g}" if tried else MISSING
        lines.append(_line([_name(row), *(found.get(seed, MISSING) for seed in seeds), trials]))
    return "\n".join(lines)


def _chosen(item: Figures) -> str:
    if item.chosen is None:
        return AS_WRITTEN
    names = [*(name for name in _FIRST if name in item.chosen), *sorted(set(item.chosen) - set(_FIRST))]
    return ", ".join(_setting(name, item.chosen[name]) for name in names)


def _setting(name: str, value: Setting | list[Setting]) -> str:
    values = value if isinstance(value, list) else [value]  # of a sequence one value per request
    shown = [value if isinstance(value, str) else f"{value:g}" for value in values]
    return f"{'lr' if name == 'learning_rate' else name} {' → '.join(shown[:1] if len(set(shown)) == 1 else shown)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _name(row: ResultRow) -> str:
    if row.name == RETRAIN and any(item.reference is not None for item in row.figures):
        return AGAINST
    name = row.name.replace("|", "\\|")
    return f"{name} ({row.density:.0%})" if row.density is not None and f"{row.density:.0%}" not in name else name


def _metric(metric: str, row: ResultRow, reference: ResultRow | None) -> str:
    unit = unit_of(metric)
    scale, decimals = (1, unit.decimals) if unit else (100, 2)
    values: dict[int, list[float]] = {}
    gaps: dict[int, list[float]] = {}
    for item in row.figures:
        value = item.values.get(metric)
        if value is None or not math.isfinite(value):
            continue
        values.setdefault(item.seed, []).append(scale * value)
        for other in reference.figures if reference else []:  # of the references themselves: the others of the seed
            goal = other.values.get(metric)
            if other.seed == item.seed and other is not item and goal is not None:
                gaps.setdefault(item.seed, []).append(scale * abs(value - goal))
    text = _spread([statistics.mean(found) for found in values.values()], decimals)
    mean = statistics.mean(statistics.mean(found) for found in gaps.values()) if gaps else None
    return text if mean is None else f"{text} ({mean:.{decimals}f})"


def _spread(values: Sequence[float], decimals: int) -> str:
    """Return mean ± standard deviation, or a single value alone."""
    if not values:
        return MISSING
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def _mean(values: Sequence[float], kind: str) -> str:
    if not values:
        return MISSING
    mean = statistics.mean(values)
    return f"{100 * mean:.2f} %" if kind == "debt" else f"{mean:,.0f}"


def section(results: Results) -> str:
    """Render the section of a suite: description, tables, picture, and the command that repeats it."""
    seeds = len({item.seed for row in results.rows for item in row.figures})
    lines = [f"### {results.title} ({results.size})", ""]
    lines += [*results.about.strip().splitlines(), ""] if results.about else []
    lines += [table(results), "", *([choices(results), ""] if results.searched else []), _meaning(results), ""]
    lines += [f"![{results.title}: distance from the goal against cost]({IMAGES}/{picture_name(results)})", ""]
    lines += [f"{seeds} seed{'s' if seeds != 1 else ''}; {results.machine}; {_versions(results)}. Measured by:", ""]
    lines += [f"    {results.command}"]
    if results.missing:
        lines += ["", f"Not measured: {', '.join(results.missing)}."]
    return "\n".join(lines)


def _versions(results: Results) -> str:
    facts = results.environment
    names = [name for name in ("salun", "python", "torch", "diffusers", "device") if name in facts]
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    return ", ".join(f"{name} {facts[name]}" for name in names) + threads


def floor_sentence(results: Results) -> str:
    """Return what the table's floor is, and what its bold values mean."""
    if results.floor is None:
        return "No floor was measured, because each seed has one retrained model. So nothing is bold."
    numbers = [item.reference for row in results.rows for item in row.figures if item.reference is not None]
    text = (
        f"Each seed has {max(numbers) + 1} retrained models of other seeds; their average gap to each other, "
        f"{results.floor:.2f} points, is the floor. "
    )
    if not results.best:
        return f"{text}Nothing is bold, because all rows are tied with the smallest gap."
    return (
        f"{text}Bold: the smallest gap and all rows that are tied with it. Their difference lies inside the floor, or "
        f"is at most {TIE:g} point with a 95 % interval that contains 0."
    )


def _meaning(results: Results) -> str:
    if results.kind == "classification":
        text = (
            "UA, RA, TA, MIA and gap in percent, mean ± standard deviation over the seeds; in parentheses the distance "
            "to Retrain. RTE: wall-clock seconds of mask and unlearning."
        )
        if any(row.name == RETRAIN for row in results.rows):
            text += f" {BEHIND.capitalize()}: mean difference from the smallest gap, paired by seed, with Student's"
            text += f" interval. {floor_sentence(results)}"
        if not results.searched:
            return text
        search = results.settings.get("search", {})
        policy = search.get("policy", "none")
        bound = "no policy bounds it" if policy == "none" else f"bounded by the policy {policy}"
        return (
            f"{text} Each row's settings were searched for with the same budget, {search.get('budget', '?')}, on "
            f"held-out data; {bound}. RTE and passes are of the whole search. Rows as written were not searched."
        )
    whose = (results.extractor or "").partition(":")[0]
    features = {"judge": "of the image classifier", "inception": "of Inception-v3"}.get(whose, "of nothing")
    count = f" ({results.images:,} images per model)" if results.images else ""
    return (
        "UA: images of forgotten classes or concepts that the image classifier does not recognise; RA: images of the "
        f"other classes that it recognises; both in percent{count}. FID and KID compare features {features} with "
        "held-out real images. RTE: wall-clock seconds of mask and unlearning. "
        "Mean ± standard deviation over the seeds."
    )


def results_json(results: Results) -> bytes:
    """Return the bytes of a results file."""
    return (json.dumps(results.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def read_results(folder: Path) -> list[Results]:
    """Read all results of suites in a folder, by name; other JSON files are skipped."""
    documents = {path: read_document(path) for path in sorted(folder.glob("*.json"))}
    return [
        parse(Results, data, str(path))
        for path, data in documents.items()
        if isinstance(data, dict) and data.get("format") == FORMAT
    ]


def picture_name(results: Results) -> str:
    """Return the name of the picture's file."""
    return f"bench-{results.suite}-{results.size}.svg"


def filled(text: str, found: Sequence[Results]) -> str:
    """Return a page with each section between its markers; a missing section is appended.

    UsageError if a marker is not closed, or occurs twice.
    """
    for results in found:
        name = f"suite:{results.suite}:{results.size}"
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) == 0:
            text = text.rstrip("\n") + f"\n\n{begin}\n{end}\n"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise UsageError(f"the markers of {name} are broken", "each must occur once, in order", "correct the page")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{section(results)}\n{end}{rest.split(end)[1]}"
    return text


def write_page(page: Path, folder: Path, check: bool = False) -> list[str]:
    """Write the page of all results in a folder, with its pictures, or check it; returns the names of the sections.

    With `check`, nothing is written: ConflictError if the page or a picture is out of date.
    """
    found = {f"{results.suite}:{results.size}": results for results in read_results(folder)}
    before = page.read_text(encoding="utf-8") if page.is_file() else "# Results\n"
    after = filled(before, list(found.values()))
    stale = [name for name, results in found.items() if not _drawn(page, results)]
    if check:
        stale += sorted({":".join(match) for match in _BEGIN.findall(after)} - set(found))
        if before != after or stale:
            what = ", ".join(stale) or "a section"
            raise ConflictError(f"{page} is out of step with {folder}", what, f"run `salun bench render --into {page}`")
        return list(found)
    for name in stale:
        write_whole(page.parent / IMAGES / picture_name(found[name]), plot(found[name]).encode())
    if before != after:
        write_whole(page, after.encode())
    return list(found)


def _drawn(page: Path, results: Results) -> bool:
    """Whether the picture is of these results; its bytes may differ between versions of matplotlib."""
    path = page.parent / IMAGES / picture_name(results)
    return path.is_file() and f"<!-- {digest(results)} -->" in path.read_text(encoding="utf-8")
