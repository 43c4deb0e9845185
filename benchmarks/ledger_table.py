"""The table of `benchmarks/ledger.py`: each operation with its target, both sides, and their ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BATCH, LOOKED_AT = 64, 256  # a claim looks at four times its batch at most
TARGETS = {"submit": 50.0, "claim": 2.0, "scrape": 0.1, "growth": 0.05}
Figures = dict[str, Any]


def _at(figures: Figures, *path: str) -> float | None:
    """Return one figure, or None where PostgreSQL was left out."""
    value: Any = figures
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return float(value)


def rows_of(document: Figures) -> list[Figures]:
    """Return the rows of the table: name, unit, target, both sides, and whether the ledger meets the target."""
    ours, theirs = document["s3"], document["postgres"]
    rows = []

    def row(name: str, unit: str, target: float | None, *path: str, other: Sequence[str] | None = None) -> None:
        mine, other_value = _at(ours, *path), _at(theirs, *(other or path))
        assert mine is not None
        met = None if target is None else (mine >= target if unit == "/s" else mine <= target)
        ratio = None
        if other_value and unit in {"/s", "s"}:
            ratio = other_value / mine if unit == "/s" else mine / other_value
        rows.append(
            {
                "name": name,
                "unit": unit,
                "target": target,
                "s3": mine,
                "postgres": other_value,
                "ratio": ratio,
                "met": met,
            }
        )

    def level(name: str) -> str:
        return f"{BATCH} claimed of {LOOKED_AT}, {int(name):,} finished"

    requests = document["requests"]
    row(f"submit {requests:,}, 16 threads", "/s", TARGETS["submit"], "submit", "per_second")
    row(f"{BATCH} claimed of {requests:,}, 0 finished", "s", TARGETS["claim"], "claim, all wait", "median_s")
    levels = list(ours["claim, 256 wait"])
    others = list(theirs.get("claim, 256 wait", levels))
    for name, other in zip(levels, others, strict=True):
        there = ("claim, 256 wait", other, "median_s")
        row(level(name), "s", TARGETS["claim"], "claim, 256 wait", name, "median_s", other=there)
    few = ours["claim, 256 wait"][levels[0]]["calls"]
    for name in levels:
        row(f"S3 calls: {level(name)}", "calls", few, "claim, 256 wait", name, "calls", other=("none",))
    row("scrape of the exporter, 99 %", "s", TARGETS["scrape"], "scrape", "p99_s", other=("none",))
    row(f"gauges refreshed, {requests:,} wait", "s", None, "refresh, all wait", "median_s")
    row("gauges refreshed, most finished", "s", None, "refresh, most finished", "median_s")
    row("sweep of 1 or 2 requests: submit, claim, settle", "s", None, "sweeps", "ledger_s")
    row(f"memory grown over {document['sweeps']:,} sweeps", "%", TARGETS["growth"], "sweeps", "growth")
    return rows


def shown(value: float | None, unit: str) -> str:
    """Return a figure with its unit."""
    if value is None:
        return "-"
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:,.0f}{unit}" if unit == "/s" else f"{value:,.0f}"


def table(rows: Sequence[Figures]) -> str:
    """Return the table in Markdown."""
    lines = ["| operation | target | S3 ledger | PostgreSQL | PostgreSQL is faster by |", "|---|---|---|---|---|"]
    for row in rows:
        unit, target = row["unit"], "-"
        if row["target"] is not None:
            target = f"{'>=' if unit == '/s' else '<='} {shown(row['target'], unit)}"
            target += "" if row["met"] else " MISSED"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g} x"
        lines.append(
            f"| {row['name']} | {target} | {shown(row['s3'], unit)} | {shown(row['postgres'], unit)} | {ratio} |"
        )
    return "\n".join(lines)
