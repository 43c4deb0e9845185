"""`salun bench`: `run` measures methods side by side, by a suite that is written down; `render` makes the page."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from salun_core.cli.options import DryRun
from salun_core.cli.output import emit, print_table, say
from salun_core.errors import UsageError

if TYPE_CHECKING:
    from salun_core.bench.plan import SuiteRun
    from salun_core.bench.results import Results
    from salun_core.bench.runner import Outcome

RESULTS = Path("benchmarks", "results")
SuiteName = Annotated[str, typer.Argument(metavar="SUITE", help="A YAML file, or a name in benchmarks/suites.")]
SizeOption = Annotated[str, typer.Option("--size", help="cpu (minutes) or paper (one GPU).")]
Only = Annotated[list[str], typer.Option("--only", metavar="NAME", help="Measure this row; may be given again.")]
RenderOnly = Annotated[
    bool, typer.Option("--render-only", help="Measure nothing: print the table of what is measured already.")
]
Into = Annotated[Path | None, typer.Option("--into", metavar="PAGE", help="Also put the table into this page.")]
ResultsFolder = Annotated[Path, typer.Option("--results", help="With --into: folder of all suites' results (JSON).")]
Moved = Annotated[
    str | None, typer.Option("--data", metavar="D", help="The data, where they lie elsewhere than the suite says.")
]
RUN_EXAMPLE = """
Example:

  $ salun bench run ddpm-class --size cpu --into docs/research/results.md
"""
RENDER_EXAMPLE = """
Example:

  $ salun bench render --into docs/research/results.md
  docs/research/results.md: ddpm-class:cpu, sd-class:cpu, sd-concept:cpu
"""


class BenchGroup(TyperGroup):
    """`salun bench` with its verbs; a suite or an option in a verb's place is answered with the verb that it needs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, which typer hides
        """Refuse what names no verb and is no slip of one.

        Raises:
            UsageError: with the command to type.
        """
        first = args[0] if args else "--help"
        slip = not first.startswith("-") and difflib.get_close_matches(first, self.commands)
        if first == "--help" or slip:  # click names the nearest verb
            return super().parse_args(ctx, args)
        what, why = f"salun bench has no command {first!r}", "its commands are run and render"
        if first.startswith("-"):
            raise UsageError(what, why, "type `salun bench run SUITE` or `salun bench render --into PAGE`")
        raise UsageError(what, why, f"type `salun bench run {shlex.join(args)}`")


app = typer.Typer(
    cls=BenchGroup, no_args_is_help=True, help="Measure methods side by side, and make the page of all results."
)


def run(
    suite: SuiteName,
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
    results: ResultsFolder = RESULTS,
    dry_run: DryRun = False,
) -> None:
    """Measure all methods of a suite and print its table; what is measured is kept, and a killed run goes on."""
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


def render(
    into: Annotated[Path, typer.Option("--into", metavar="PAGE", help="The page; other text on it is left as it is.")],
    results: Annotated[Path, typer.Option("--results", help="Folder of all suites' results (JSON).")] = RESULTS,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is out of step.")] = False,
) -> None:
    """Make the page of all results from their JSON, with its pictures; nothing is measured."""
    from salun_core.bench.page import write_page

    names = write_page(into, results, check)
    emit({"page": str(into), "sections": names}, lambda: typer.echo(f"{into}: {', '.join(names) or 'no section'}"))


def _plan(suite: str, size: str, data: str | None, only: list[str], seeds: int | None) -> SuiteRun:
    from salun_core.bench.plan import SuiteRun
    from salun_core.bench.suite import find_suite, load_suite

    path = find_suite(suite)
    return SuiteRun(load_suite(path), size, path.parent, data, tuple(only), seeds)


def _dry_run(plan: SuiteRun, folder: Path) -> None:
    from salun_core.bench.cell import kept_cell

    rows: list[dict[str, Any]] = []
    for cell in plan.cells:
        note = kept_cell(folder, cell)
        cost = ", ".join(_cost(name, amount) for name, amount in plan.cost(cell).items() if amount)
        rows.append(
            {"cell": cell.name, "method": cell.entry.method, "mask": cell.entry.mask, "cost": cost or "closed form"}
            | {"seconds": round(note.seconds, 1) if note else None}
        )
    facts = {"dry_run": True, "suite": plan.suite.name, "size": plan.size_name, "cells": rows}

    def show() -> None:
        print_table(["cell", "method", "mask", "cost", "seconds"], [list(row.values()) for row in rows])
        typer.echo(f"dry run: the suite is valid, {len(rows)} cells; nothing was measured")

    emit(facts, show)


def _cost(name: str, amount: int | str) -> str:
    return f"{name} {amount}" if isinstance(amount, str) else f"{amount:,} {name}"


def _show(plan: SuiteRun, folder: Path, outcome: Outcome | None, into: Path | None, kept: Path) -> None:
    from salun_core.bench.page import results_json, write_page
    from salun_core.bench.plot import plot
    from salun_core.bench.results import collect
    from salun_core.bench.table import choices, table
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
