"""Writes the measured tables from lab/results/*.json into the pages of docs/research, between their markers.

python -m lab.studies.readme_tables [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.bench.page import AGAINST
from lab.bench.results import ResultRow, Results, best_rows, gaps_of
from salun_core.methods.recipe import AUTO_METHOD
from salun_core.report.wording import MISSING
from salun_core.tuning.space import Space

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "lab" / "results"
PAGES = {
    "docs/research/study.md": ("study", "study-starts", "study-cost"),
    "docs/research/speed.md": (
        "masked-step",
        "speed",
        "speed-machines",
        "splits",
        "scale",
        "scale-whole",
        "retain-fraction",
        "full-size",
        "cards",
    ),
}
STUDY = {  # suites of the classification study, by the heading of their column
    "digits, random 10 %": "digits-random10-cpu",
    "digits, random 50 %": "digits-random50-cpu",
    "digits, class": "digits-class-cpu",
    "photographs, class": "imagenette-class-cpu",
    "faces, person": "faces-subject-cpu",
    "CIFAR-10, random 10 %": "cifar10-random10-cpu",
    "CIFAR-10, random 50 %": "cifar10-random50-cpu",
    "CIFAR-10, class": "cifar10-class-cpu",
}
SWEPT = 20  # images that the request of a sweep names, in lab/studies/scale.py
ADAPTIVE, PUBLISHED = "SalUn, adaptive recipe", "SalUn, published recipe"
COSTS = {  # rows of the table of costs: what is shown
    "SalUn": "SalUn, searched",
    "search over methods": "search over methods",
    ADAPTIVE: "SalUn, adaptive recipe, the default",
    PUBLISHED: "SalUn, published recipe, 10 epochs",
}
COMPARED = {  # by the name of the results: the script that writes them
    "mask": "lab/studies/mask.py",
    "masked-step": "lab/studies/masked_step.py",
    "masked-epoch": "lab/studies/masked_epoch.py",
    "loading": "lab/studies/loading.py",
    "attack": "lab/studies/attack.py",
}


def cost_table(step: dict[str, Any], mask: dict[str, Any]) -> str:
    """Render the cost of masks and masked steps, here and in the usual procedure."""
    usual, ours = mask["rows"]["usual, ten densities"], mask["rows"]["ours, ten densities"]
    one = mask["rows"]["ours, one density"]
    lines = [
        "| ResNet-18, 11.2 M weights | usual procedure | here |",
        "|---|---|---|",
        f"| masks of ten densities, CPU s | {usual['cpu_s']:.1f} | {ours['cpu_s']:.2f} (one: {one['cpu_s']:.2f}) |",
        f"| added peak memory, MB | {usual['peak_mb']:.0f} | {ours['peak_mb']:.0f} |",
        f"| mask file, MB | {usual['file_bytes'] / 1e6:.1f} | {ours['file_bytes'] / 1e6:.2f} |",
    ]
    for name, row in step["rows"].items():
        cells = f"{row['mask and restore / plain']:.2f} x | {row['masked / plain']:.2f} x"
        lines.append(f"| step of {name}, against the unmasked step | {cells} |")
    return "\n".join(lines)


def _gaps(row: dict[str, Any]) -> list[float]:
    return [100 * item["gap"] for item in row["figures"] if item["gap"] is not None]


def _rows(documents: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of each suite by name."""
    return {title: {row["name"]: row for row in documents[stem]["rows"]} for title, stem in STUDY.items()}


def study_table(documents: dict[str, Any]) -> str:
    """Render the average gap by suite: of retraining itself, of each method with a search, and of recipes as written.

    The smallest is bold, together with the rows that are tied with it. Below the table stands why, if nothing is.
    """
    suites = {title: Results.model_validate(documents[stem]) for title, stem in STUDY.items()}
    gaps = {title: {row.name: gaps_of(row) for row in results.rows} for title, results in suites.items()}
    rows = [row for results in suites.values() for row in results.rows]
    searched = dict.fromkeys(row.name for row in rows if any(item.chosen for item in row.figures))
    methods = [*searched, *(name for name in (ADAPTIVE, PUBLISHED) if any(row.name == name for row in rows))]
    best = {
        title: best_rows({name: gaps[title].get(name, {}) for name in methods}, results.floor)
        for title, results in suites.items()
    }
    unmeasured = [title for title, results in suites.items() if results.floor is None]
    lines = ["| average gap, points | " + " | ".join(STUDY) + " |", "|---" + "|--:" * len(STUDY) + "|"]
    for name in ["original", *([] if len(unmeasured) == len(suites) else ["Retrain"]), *methods]:
        cells: list[str] = []
        for title in suites:
            values = list(gaps[title].get(name, {}).values())
            if not values or (name == "Retrain" and title in unmeasured):
                cells.append(MISSING)
                continue
            text = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            cells.append(f"**{text}**" if name in best[title] else text)
        lines.append(f"| {AGAINST if name == 'Retrain' else name} | " + " | ".join(cells) + " |")
    if unmeasured:
        where = "" if len(unmeasured) == len(suites) else f" for {', '.join(unmeasured)}"
        there = " there" if where else ""
        lines += ["", f"No floor was measured{where}, so nothing is bold{there}: each seed has one retrained model."]
    return "\n".join(lines)


def starts_table(documents: dict[str, Any]) -> str:
    """Render how many searches selected a point that is tried in every run, whatever the model.

    That is the method's defaults. For the search over methods it is their mirror image, too. Epochs are not compared,
    because they are measured anyway.
    """
    lines = ["| fixed points among the selected settings | " + " | ".join([*STUDY, "all"]) + " |"]
    lines.append("|---" + "|--:" * (len(STUDY) + 1) + "|")
    suites = [Results.model_validate(documents[stem]) for stem in STUDY.values()]
    for title, over_methods in (("searches of one method", False), ("search over methods", True)):
        counts = [
            [
                _is_fixed_point(row, item.chosen)
                for row in results.rows
                if (row.method == AUTO_METHOD) == over_methods
                for item in row.figures
                if item.chosen
            ]
            for results in suites
        ]
        counts.append([found for one in counts for found in one])
        lines.append(f"| {title} | " + " | ".join(f"{sum(one)} of {len(one)}" for one in counts) + " |")
    return "\n".join(lines)


def _is_fixed_point(row: ResultRow, chosen: Mapping[str, Any]) -> bool:
    method = chosen.get("method", row.method)
    space = Space.of(method, row.config, row.density)
    points = [space.start(), *([space.mirror()] if row.method == AUTO_METHOD else [])]
    values = {name: values.index(chosen[name]) for name, values in space.choices.items()}
    values |= {name: chosen[name] for name in space.ranges}
    if len(space.densities) > 1:
        values["density"] = space.densities.index(chosen["density"])
    return any(all(f"{point[name]:.3g}" == f"{value:.3g}" for name, value in values.items()) for point in points)


def cost_of_gap(documents: dict[str, Any]) -> str:
    """Render gap and passes of SalUn with a search, of the search over methods, and of the recipes as written.

    Below the table stands in how many suites the adaptive recipe reaches the gap of the published one with at most a
    third of its passes, if some suite has both.
    """
    suites = _rows(documents)
    lines = ["| gap, points (passes) | " + " | ".join(STUDY) + " |", "|---" + "|--:" * len(STUDY) + "|"]
    costs: dict[str, dict[str, tuple[float, float]]] = {}
    for name, shown in COSTS.items():
        found = {title: rows[name] for title, rows in suites.items() if name in rows}
        costs[name] = {
            title: (statistics.mean(_gaps(row)), statistics.mean(item["passes"] for item in row["figures"]))
            for title, row in found.items()
        }
        pairs = [costs[name].get(title) for title in suites]
        cells = [MISSING if pair is None else f"{pair[0]:.2f} ({pair[1]:,.0f})" for pair in pairs]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    both = [(costs[ADAPTIVE][title], costs[PUBLISHED][title]) for title in costs[ADAPTIVE]]
    if both:
        reached = [(one, other) for one, other in both if one[0] <= other[0]]
        cheap = sum(3 * one[1] <= other[1] for one, other in reached)
        lines += [
            "",
            f"The adaptive recipe comes as near as ten published epochs in {len(reached)} of the {len(both)} suites "
            f"where it was measured, in {cheap} of them with at most a third of the passes.",
        ]
    return "\n".join(lines)


def speed_table(documents: dict[str, Any]) -> str:
    """Render every comparison with its target."""
    lines = ["| what | usual procedure | here | found | target |", "|---|---|---|---|---|"]
    for name in COMPARED:
        for item in documents[name]["comparisons"]:
            lines.append("| " + " | ".join(item[key] for key in ("what", "usual", "ours", "ratio", "target")) + " |")
    return "\n".join(lines)


def machines(documents: dict[str, Any]) -> str:
    """Render where each comparison ran."""
    lines = ["| script | rounds | threads | torch | processor |", "|---|---|---|---|---|"]
    for name, script in COMPARED.items():
        facts = documents[name]
        rounds = f"{facts['rounds']}{', quick' if facts['quick'] else ''}"
        lines.append(f"| `{script}` | {rounds} | {facts['threads']} | {facts['torch']} | {facts['machine']} |")
    return "\n".join(lines)


def split_table(document: dict[str, Any]) -> str:
    """Render what a split costs by its number of rows, in Parquet and in JSON."""
    actions = list(document["rows"][0]["costs"])
    names = sorted(actions, key=("write", "read", "resolve", "subtract", "membership").index)
    lines = [
        "| rows | form | file, MB | " + " | ".join(f"{name}, CPU s" for name in names) + " | peak, MB |",
        "|--:|---" + "|--:" * (len(names) + 2) + "|",
    ]
    for row in document["rows"]:
        costs = row["costs"]
        peak = max(cost["peak_mb"] for cost in costs.values())
        cells = " | ".join(f"{costs[name]['cpu_s']:.2f}" for name in names)
        size = costs["write"]["bytes"] / 1e6
        form = {"json": "JSON", "parquet": "Parquet"}[row["form"]]
        lines.append(f"| {row['rows']:,} | {form} | {size:.1f} | {cells} | {peak:.0f} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Return each marker's table."""
    documents = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return {
        "study": study_table(documents),
        "study-starts": starts_table(documents),
        "study-cost": cost_of_gap(documents),
        "masked-step": cost_table(documents["masked-step"], documents["mask"]),
        "speed": speed_table(documents),
        "speed-machines": machines(documents),
        "splits": split_table(documents["splits"]),
        "scale": scale_table(documents["scale"]),
        "scale-whole": scale_whole(documents["scale"]),
        "retain-fraction": fraction_table(documents["retain-fraction"]),
        "full-size": full_size_table(documents["full-size"]),
        "cards": cards_table(documents["full-size"]),
    }


def _scaled(document: dict[str, Any]) -> tuple[list[int], dict[tuple[int, float], dict[str, Any]]]:
    """Return the numbers of rows that were measured, and the costs by rows and forgotten images."""
    costs = {(row["rows"], row["forgotten"]): row["costs"] for row in document["rows"]}
    return sorted({rows for rows, _ in costs}), costs


def _forgotten(count: float) -> str:
    return f"{count:,.0f}" if count >= 1 else f"{count:.0%}".replace("%", " %")


def scale_table(document: dict[str, Any]) -> str:
    """Render what each step costs by the number of rows, and how it grows over the last tenfold."""
    sizes, costs = _scaled(document)
    shown = [f"{size:,}" for size in sizes]
    lines = [
        f"| step | forgotten | CPU s, {shown[0]} rows | "
        + " | ".join([*shown[1:], "growth", f"peak, MB, {shown[0]} rows", *shown[1:]])
        + f" | read, MB, {shown[0]} rows | "
        + " | ".join(shown[1:])
        + " |",
        "|---|--:" + "|--:" * (3 * len(sizes) + 1) + "|",
    ]
    forgotten = sorted({count for _, count in costs if count not in (0, SWEPT)}, key=lambda count: (count < 1, count))
    for step in ("fetch", "mask", "unlearn", "evaluate", "publish"):
        for count in forgotten:
            found = [costs.get((size, count), {}).get(step) for size in sizes]
            last = [cost["cpu_s"] for cost in found[-2:] if cost]
            growth = f"{last[1] / last[0]:.1f} x" if len(last) == 2 else MISSING
            cells = [f"{cost['cpu_s']:.1f}" if cost else MISSING for cost in found] + [growth]
            cells += [f"{cost['peak_mb']:.0f}" if cost else MISSING for cost in found]
            cells += [f"{cost['read_mb']:.1f}" if cost else MISSING for cost in found]
            lines.append(f"| {step} | {_forgotten(count)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scale_whole(document: dict[str, Any]) -> str:
    """Render what Python's imports, a training and a whole sweep cost by the number of rows."""
    sizes, costs = _scaled(document)
    shown = {"imports": (0, "imports alone"), "train": (0, "training"), "sweep": (SWEPT, f"sweep, {SWEPT} forgotten")}
    names = " | ".join(f"{title}, CPU s | peak, MB | read, MB" for _, title in shown.values())
    lines = [f"| rows | {names} |", "|--:" + "|--:" * 3 * len(shown) + "|"]
    for size in sizes:
        cells: list[str] = []
        for name, (count, _) in shown.items():
            cost = costs.get((size, count), {}).get(name)
            values = (f"{cost['cpu_s']:.1f}", f"{cost['peak_mb']:.0f}", f"{cost['read_mb']:.1f}") if cost else None
            cells += values or (MISSING,) * 3
        lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fraction_table(document: dict[str, Any]) -> str:
    """Render the quality and the cost of epochs that train on a part of D_r."""
    lines = ["| forget | share of D_r an epoch | gap, points | UA, % | RA, % | TA, % | passes |", "|---|" + "--:|" * 6]
    for row in document["rows"]:
        figures = row["figures"]
        cells = [
            f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
            for values in ([item[name] for item in figures] for name in ("gap", "UA", "RA", "TA"))
        ]
        passes = statistics.mean(item["passes"] for item in figures)
        lines.append(f"| {row['request']} | {row['fraction']:g} | {' | '.join(cells)} | {passes:,.0f} |")
    return "\n".join(lines)


def full_size_table(document: dict[str, Any]) -> str:
    """Render what the steps of models of full size took, and the ratio of the measured to the predicted peak."""
    lines = ["| model | step | CPU s | peak, GB | predicted, GB | ratio |", "|---|---|--:|--:|--:|--:|"]
    for part in document["parts"].values():
        for action in ("mask", "unlearn", "frozen"):
            cost = part.get("measured", {}).get(action)
            if cost is None:
                continue
            cells = [f"{cost['cpu_s']:.0f}", f"{cost['peak'] / 1e9:.2f}", MISSING, MISSING]
            if action in part["predicted"]:
                predicted = part["predicted"][action] + cost["imported"]
                cells[2:] = [f"{predicted / 1e9:.2f}", f"{cost['peak'] / predicted:.2f}"]
            lines.append(f"| {part['title']} | {action} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cards_table(document: dict[str, Any]) -> str:
    """Render how many examples fit the memory of a card at once."""
    parts = [part for part in document["parts"].values() if "cards" in part]
    cards = list(parts[0]["cards"][0]["fits"])
    lines = [
        "| model | settings | scoring 1, GB | step with 1, GB | " + " | ".join(f"{card} GB" for card in cards) + " |",
        "|---|---|--:|--:|" + "--:|" * len(cards),
    ]
    for part in parts:
        for row in part["cards"]:
            sizes = " | ".join(f"{row['one'][name] / 1e9:.1f}" for name in ("mask", "step"))
            fits = " | ".join(f"{found['mask']} / {found['step']}" for found in row["fits"].values())
            lines.append(f"| {part['title']} | {row['settings']} | {sizes} | {fits} |")
    return "\n".join(lines)


def filled(page: str, text: str) -> str:
    """Return a page with the tables between their markers."""
    found = tables()
    for name in PAGES[page]:
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no marker {name}")
        text = pattern.sub(lambda match, name=name: f"{match[1]}{found[name]}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    arguments = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(page, before)
        if arguments.check and before != after:
            sys.exit(f"{page} is out of step with lab/results: run `make generated`")
        if before != after:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
