"""`salun bench` measures the methods of a suite, `salun calibrate` how often the gate is right. Both write pages."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from salun_core.cli.options import DryRun
from salun_core.cli.output import echo, emit, print_table, progress
from salun_core.errors import ModelError, UsageError

if TYPE_CHECKING:
    from lab.bench.plan import SuiteRun
    from lab.bench.runner import SuiteOutcome

RESULTS = Path("lab", "results")


class BenchGroup(TyperGroup):
    """Compare unlearning methods on benchmark suites."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, which typer hides
        """Refuse a first word that is neither a verb nor a misspelt one, such as the name of a suite.

        UsageError names the command to type.
        """
        first = args[0] if args else "--help"
        misspelt = not first.startswith("-") and difflib.get_close_matches(first, self.commands)
        if first == "--help" or misspelt:  # click names the nearest verb
            return super().parse_args(ctx, args)
        what, why = f"salun bench has no command {first!r}", "its commands are run and render"
        if first.startswith("-"):
            raise UsageError(what, why, "type `salun bench run SUITE` or `salun bench render --into PAGE`")
        raise UsageError(what, why, f"type `salun bench run {shlex.join(args)}`")


def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A YAML file, or a name in lab/suites.")],
    size: Annotated[str, typer.Option(help="cpu (minutes) or paper (one GPU).")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of all files. Default: .salun/bench/SUITE-SIZE.")] = None,
    only: Annotated[list[str], typer.Option(metavar="NAME", help="Measure this row; may be repeated.")] = [],
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds. Default: all of the suite.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="D", help="Location of the data, if it is not that of the suite.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="Time limit of this call in seconds. Default: the suite's.")
    ] = None,
    render_only: Annotated[bool, typer.Option("--render-only", help="Measure nothing; print earlier results.")] = False,
    into: Annotated[Path | None, typer.Option(metavar="PAGE", help="Also write the table into this page.")] = None,
    results: Annotated[Path, typer.Option(help="With --into: folder of all suites' results (JSON).")] = RESULTS,
    dry_run: DryRun = False,
) -> None:
    """Measure all methods of a suite and print its table. Results are kept, so a killed run resumes."""
    from lab.bench.plan import SuiteRun
    from lab.bench.runner import run_suite
    from lab.bench.suite import find_suite, load_suite

    path = find_suite(suite)
    plan = SuiteRun(load_suite(path), size, path.parent, data, tuple(only), seeds)
    folder = out or Path(".salun", "bench", f"{plan.suite.name}-{size}")
    if dry_run:
        _dry_run(plan, folder)
        return
    outcome = None if render_only else run_suite(plan, folder, progress, budget_seconds=budget)
    _write_results(plan, folder, outcome, into, results)


def _dry_run(plan: SuiteRun, folder: Path) -> None:
    from lab.bench.cell import kept_cell

    def cost(name: str, amount: int | str) -> str:
        return f"{name} {amount}" if isinstance(amount, str) else f"{amount:,} {name}"

    rows: list[dict[str, Any]] = []
    for cell in plan.cells:
        known = kept_cell(folder, cell)
        costs = ", ".join(cost(name, amount) for name, amount in plan.cost(cell).items() if amount)
        rows.append(
            {"cell": cell.name, "method": cell.entry.method, "mask": cell.entry.mask, "cost": costs or "closed form"}
            | {"seconds": round(known.seconds, 1) if known else None}
        )

    def show() -> None:
        print_table(["cell", "method", "mask", "cost", "seconds"], [list(row.values()) for row in rows])
        echo(f"dry run: the suite is valid, {len(rows)} cells; nothing was measured")

    emit({"dry_run": True, "suite": plan.suite.name, "size": plan.size_name, "cells": rows}, show)


def _write_results(plan: SuiteRun, folder: Path, outcome: SuiteOutcome | None, into: Path | None, kept: Path) -> None:
    from lab.bench.page import choices, results_json, table, write_page
    from lab.bench.plot import plot
    from lab.bench.results import collect
    from salun_core.storage.local_files import write_whole

    if outcome and outcome.failed and not (outcome.measured or outcome.kept):
        _raise_failures(outcome)
    found = collect(plan, folder)
    text = "\n\n".join(filter(None, (table(found), choices(found))))
    write_whole(folder / "results.json", results_json(found))
    write_whole(folder / "table.md", f"{text}\n".encode())
    write_whole(folder / "plot.svg", plot(found).encode())
    if into is not None:
        write_whole(kept / f"{found.suite}-{found.size}.json", results_json(found))
        write_page(into, kept)
    counts = {"measured": outcome.measured, "kept": outcome.kept, "failed": outcome.failed} if outcome else {}

    def show() -> None:
        echo(text)
        if found.missing:
            why = ": the budget is spent" if outcome and outcome.missing else ""
            progress(f"not measured{why}: {', '.join(found.missing)}")
        progress(f"results in {folder}")

    emit(found.model_dump(mode="json") | {"run": counts}, show)
    if outcome:
        _raise_failures(outcome)


def _raise_failures(outcome: SuiteOutcome) -> None:
    if outcome.failed:
        name, why = next(iter(outcome.failed.items()))
        what = f"{len(outcome.failed)} cells failed"
        raise ModelError(what, f"{name}: {why}", "correct their settings and run it again")


def render(
    into: Annotated[Path, typer.Option(metavar="PAGE", help="The page to update; its other text is kept.")],
    results: Annotated[Path, typer.Option(help="Folder of all suites' results (JSON).")] = RESULTS,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is out of date.")] = False,
) -> None:
    """Write the page of all results, with its pictures, from their JSON. Nothing is measured."""
    from lab.bench.page import write_page

    names = write_page(into, results, check)
    emit({"page": str(into), "sections": names}, lambda: echo(f"{into}: {', '.join(names) or 'no section'}"))


def calibrate(
    models: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Models of each population. Default: the number that each cell defines."),
    ] = None,
    cells: Annotated[list[str], typer.Option(metavar="NAME", help="Measure this cell; may be repeated.")] = [],
    policy: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Judge by this policy (a file or a name) instead of the shipped ones."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that measure cells at the same time.")] = 1,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the counts into this file. With --cells, its other cells are kept."
        ),
    ] = None,
    into: Annotated[Path | None, typer.Option(metavar="PAGE", help="Also write the table into this page.")] = None,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Measure nothing: read the counts from the file of --results.")
    ] = False,
) -> None:
    """Measure how often the gate's policy is right.

    It counts how often the policy passes honest models, failed ones and forgeries, for each kind of request. It trains
    small models on bundled data. Repeated calls on one machine give the same numbers.
    """
    from lab.calibration.table import HEADINGS, columns, merged, read_calibration, write_page, written
    from lab.calibration.table import calibrate as measure
    from salun_core.storage.local_files import write_whole

    if render_only:
        if results is None:
            raise UsageError(
                "there is nothing to render", "--render-only reads the counts from a file", "add --results FILE"
            )
        found = read_calibration(results)
    else:
        found = measure(cells, models, policy, workers, lambda name: progress(f"measured: {name}"))
        if results is not None and results.is_file() and cells:
            found = merged(read_calibration(results), found)
        if results is not None:
            write_whole(results, written(found))
    if into is not None:
        write_page(into, found)
    emit(found.model_dump(mode="json"), lambda: print_table(HEADINGS, [columns(row) for row in found.rows]))
