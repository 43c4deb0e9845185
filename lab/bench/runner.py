"""Runs the cells of a suite; a cell that exists is not measured again.

A run may be killed at any point. A cell is measured in `work/` and renamed to its place, so that its folder is complete
or does not exist; the next run deletes `work/`, skips the complete cells and measures the others. A lock on the output
folder keeps a second run out; the kernel releases it when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lab.bench.cell import kept_cell, measure_cell
from lab.bench.plan import Cell, SuiteRun
from lab.bench.prepared import Preparation, Progress
from salun_core.digest import digest_json
from salun_core.errors import ConflictError, DataError, GateRefusedError, IntegrityError, ModelError, UsageError

_OF_ONE_ROW = (UsageError, DataError, ModelError, IntegrityError, GateRefusedError)


@dataclass
class SuiteOutcome:
    """Result of a run of a suite: cells measured, kept, left out by the budget, and failed (with the reason)."""

    measured: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_suite(
    plan: SuiteRun,
    out: Path,
    progress: Progress,
    on_cell: Callable[[str], None] | None = None,
    budget_seconds: float | None = None,
) -> SuiteOutcome:
    """Measure all cells of a plan that do not exist yet; `budget_seconds` replaces the suite's own.

    ConflictError: another run uses the folder. SalunError: an artifact that the cells share could not be built.
    """
    cells, outcome = plan.cells, SuiteOutcome()
    budget = budget_seconds or plan.size.budget_seconds
    started = time.perf_counter()

    def exceeds(more: float) -> bool:
        return budget is not None and time.perf_counter() - started + more > budget

    with _locked(out), _threads(plan.size.threads):
        shutil.rmtree(out / "work", ignore_errors=True)
        preparation = Preparation(plan, out, progress)
        for seed in plan.seeds:
            of_seed = [cell for cell in cells if cell.seed == seed]
            if exceeds(0.0):
                outcome.missing += [cell.name for cell in of_seed if kept_cell(out, cell) is None]
                continue
            ready = preparation.ready(seed)
            for cell in of_seed:
                inputs, note = digest_json([cell.plan, ready.inputs]), kept_cell(out, cell)
                if note is not None and note.inputs == inputs:
                    outcome.kept.append(cell.name)
                    continue
                if exceeds(_expected_seconds(out, cell, cells)):
                    outcome.missing.append(cell.name)
                    continue
                progress(f"cell {cell.name}")
                try:
                    measure_cell(preparation, cell, ready, inputs)
                    outcome.measured.append(cell.name)
                except _OF_ONE_ROW as error:  # the other rows may succeed
                    outcome.failed[cell.name] = str(error)
                    progress(f"cell {cell.name} failed: {error}")
                if on_cell:
                    on_cell(cell.name)
    return outcome


def _expected_seconds(out: Path, cell: Cell, cells: list[Cell]) -> float:
    """Duration of the same row at another seed, or of the slowest row so far."""
    seconds: dict[str, float] = {}
    for other in cells:
        note = kept_cell(out, other)
        if note is not None:
            seconds[other.entry.name] = max(note.seconds, seconds.get(other.entry.name, 0.0))
    return seconds.get(cell.entry.name, max(seconds.values(), default=0.0))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
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
