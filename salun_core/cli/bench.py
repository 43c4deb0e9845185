"""`salun bench`: methods side by side, by a suite that is written down, and the tables that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import DryRun
from salun_core.cli.output import emit, print_table, say

if TYPE_CHECKING:
    from salun_core.bench.plan import Plan
    from salun_core.bench.results import Results
    from salun_core.bench.runner import Outcome

SuiteName = Annotated[str | None, typer.Argument(metavar="SUITE", help="A YAML file, or a name in benchmarks/suites.")]
SizeOption = Annotated[str, typer.Option("--size", help="cpu (minutes) or paper (one GPU).")]
Only = Annotated[list[str], typer.Option("--only", metavar="NAME", help="Measure this row; may be given again.")]
RenderOnly = Annotated[
    bool, typer.Option("--render-only", help="Measure nothing; without a suite, the page of all results.")
]
Into = Annotated[Path | None, typer.Option("--into", metavar="PAGE", help="Also put the table into this page.")]
ResultsFolder = Annotated[Path, typer.Option("--results", help="With --into: folder of all suites' results (JSON).")]
Moved = Annotated[
    str | None, typer.Option("--data", metavar="D", help="The data, where they lie elsewhere than the suite says.")
]
EXAMPLE = """
Example:

  $ salun bench ddpm-class --size cpu --into docs/results.md
"""


def bench(
    suite: SuiteName = None,
    size: SizeOption = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for all that is made; .salun/bench/SUITE-SIZE by default.")
    ] = None,
    only: Only = [],  # noqa: B006 - typer reads it and hands over a new list
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="So many of the suite's seeds.")] = None,
    data: Moved = None,
    budget: Annotated[
        float | None, typer.Option("--budget", min=1, help="Seconds of this run, in place of the suite's.")
    ] = None,
    render_only: RenderOnly = False,
    into: Into = None,
    results: ResultsFolder = Path("benchmarks", "results"),
    check: Annotated[
        bool, typer.Option("--check", help="With --render-only --into: write nothing, fail if it is out of step.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure all methods of a suite and print its table; what is measured is kept, and a killed run goes on."""
    from salun_core.errors import UsageError

    if suite is None:
        if not render_only or into is None:
            raise UsageError("no suite is named", "there is nothing to measure", "give one of benchmarks/suites")
        _page(into, results, check)
        return
    plan = _plan(suite, size, data, only, seeds)
    folder = out or Path(".salun", "bench", f"{plan.suite.name}-{size}")
    if dry_run:
        _dry_run(plan, folder)
        return
    outcome = None
    if not render_only:
        from salun_core.bench.runner import run_suite

        outcome = run_suite(plan, folder, say, budget_seconds=budget)
    _show(plan, folder, outcome, into, results)


def _plan(suite: str, size: str, data: str | None, only: list[str], seeds: int | None) -> Plan:
    from salun_core.bench.plan import Plan
    from salun_core.bench.suite import find_suite, load_suite

    path = find_suite(suite)
    return Plan(load_suite(path), size, path.parent, data, tuple(only), seeds)


def _page(into: Path, results: Path, check: bool) -> None:
    from salun_core.bench.page import write_page

    names = write_page(into, results, check)
    emit({"page": str(into), "sections": names}, lambda: typer.echo(f"{into}: {', '.join(names) or 'no section'}"))


def _dry_run(plan: Plan, folder: Path) -> None:
    from salun_core.bench.runner import kept_cell

    rows: list[dict[str, Any]] = []
    for cell in plan.cells:
        note = kept_cell(folder, cell)
        cost = ", ".join(f"{count:,} {name}" for name, count in plan.cost(cell).items() if count)
        rows.append(
            {"cell": cell.name, "method": cell.entry.method, "mask": cell.entry.mask, "cost": cost or "closed form"}
            | {"seconds": round(note.seconds, 1) if note else None}
        )
    facts = {"dry_run": True, "suite": plan.suite.name, "size": plan.size_name, "cells": rows}

    def show() -> None:
        print_table(["cell", "method", "mask", "cost", "seconds"], [list(row.values()) for row in rows])
        typer.echo(f"dry run: the suite is valid, {len(rows)} cells; nothing was measured")

    emit(facts, show)


def _show(plan: Plan, folder: Path, outcome: Outcome | None, into: Path | None, kept: Path) -> None:
    from salun_core.bench.page import results_json, write_page
    from salun_core.bench.plot import plot
    from salun_core.bench.results import collect
    from salun_core.bench.table import table
    from salun_core.storage.local import write_whole

    if outcome and outcome.failed and not (outcome.measured or outcome.kept):
        _raise_failures(outcome)
    found = collect(plan, folder)
    text = table(found)
    write_whole(folder / "results.json", results_json(found))
    write_whole(folder / "table.md", f"{text}\n".encode())
    write_whole(folder / "plot.svg", plot(found).encode())
    if into is not None:
        write_whole(kept / f"{found.suite}-{found.size}.json", results_json(found))
        write_page(into, kept)
    emit(_facts(found, outcome), lambda: _print(found, text, folder, outcome))
    if outcome:
        _raise_failures(outcome)


def _facts(found: Results, outcome: Outcome | None) -> dict[str, Any]:
    run = {"measured": outcome.measured, "kept": outcome.kept, "failed": outcome.failed} if outcome else {}
    return found.model_dump(mode="json") | {"run": run}


def _print(found: Results, text: str, folder: Path, outcome: Outcome | None) -> None:
    typer.echo(text)
    if found.missing:
        why = ": the budget is spent" if outcome and outcome.missing else ""
        say(f"not measured{why}: {', '.join(found.missing)}")
    say(f"results in {folder}")


def _raise_failures(outcome: Outcome) -> None:
    from salun_core.errors import ModelError

    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        raise ModelError(
            f"{len(outcome.failed)} cells failed", f"{name}: {why}", "correct their settings and run it again"
        )
