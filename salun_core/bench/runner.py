"""Runs the cells of a suite; one that is done is not done again."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from salun_core.bench.cell import kept_cell, measure_cell
from salun_core.bench.plan import Cell, SuiteRun
from salun_core.bench.prepared import Preparation, Progress, Ready
from salun_core.digest import digest_json
from salun_core.errors import ConflictError, DataError, GateRefusedError, IntegrityError, ModelError, UsageError

_OF_ONE_ROW = (UsageError, DataError, ModelError, IntegrityError, GateRefusedError)


@dataclass
class Outcome:
    """What a run of a suite came to.

    Args:
        measured: cells that this run measured.
        kept: cells that were there.
        missing: cells for which the budget was too small.
        failed: cells that gave no figures, with the reason.
    """

    measured: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_suite(
    plan: SuiteRun,
    out: Path,
    say: Progress,
    on_cell: Callable[[str], None] | None = None,
    budget_seconds: float | None = None,
) -> Outcome:
    """Measure all cells of a plan that are not there yet.

    Whatever ends it, a cell's folder is there whole or not at all, and the next run goes on with the cells that lack.

    Args:
        plan: the suite.
        out: folder for all that is made.
        say: called with a line of progress.
        on_cell: called with the name of each cell that was measured.
        budget_seconds: of this run, in place of the suite's own.

    Returns:
        What was measured, kept, and is missing.

    Raises:
        ConflictError: another run works in the folder.
        SalunError: a part that the cells share could not be made.
    """
    cells, outcome = plan.cells, Outcome()
    budget = budget_seconds or plan.size.budget_seconds
    started = time.perf_counter()
    with _owned(out), _threads(plan.size.threads):
        shutil.rmtree(out / "work", ignore_errors=True)
        preparation = Preparation(plan, out, say)
        for seed in plan.seeds:
            mine = [cell for cell in cells if cell.seed == seed]
            if _over(budget, started, 0.0):
                outcome.missing += [cell.name for cell in mine if kept_cell(out, cell) is None]
                continue
            ready = preparation.ready(seed)
            for cell in mine:
                wanted = digest_json([cell.plan, ready.inputs])
                note = kept_cell(out, cell)
                if note is not None and note.inputs == wanted:
                    outcome.kept.append(cell.name)
                elif _over(budget, started, _expected(out, cell, cells)):
                    outcome.missing.append(cell.name)
                else:
                    _measure(preparation, cell, ready, wanted, outcome)
                    if on_cell:
                        on_cell(cell.name)
    return outcome


def _measure(preparation: Preparation, cell: Cell, ready: Ready, inputs: str, outcome: Outcome) -> None:
    preparation.say(f"cell {cell.name}")
    try:
        measure_cell(preparation, cell, ready, inputs)
        outcome.measured.append(cell.name)
    except _OF_ONE_ROW as error:  # the others may do
        outcome.failed[cell.name] = str(error)
        preparation.say(f"cell {cell.name} failed: {error}")


def _over(budget: float | None, started: float, more: float) -> bool:
    return budget is not None and time.perf_counter() - started + more > budget


def _expected(out: Path, cell: Cell, cells: list[Cell]) -> float:
    """Seconds that a cell may take: as the same row at another seed took, or the slowest row so far."""
    seconds: dict[str, float] = {}
    for other in cells:
        note = kept_cell(out, other)
        if note is not None:
            seconds[other.entry.name] = max(note.seconds, seconds.get(other.entry.name, 0.0))
    return seconds.get(cell.entry.name, max(seconds.values(), default=0.0))


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Hold the folder for one run; the lock goes with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(f"{out} is in use", "another bench runs there", "wait for it, or give --out") from error
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
