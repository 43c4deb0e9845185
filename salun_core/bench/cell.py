"""Measures one cell: mask or search, unlearning and evaluation, for each request; its folder appears whole or not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from salun_core.bench.plan import Cell
from salun_core.bench.prepared import Preparation, Ready
from salun_core.config import Document, load
from salun_core.data.split import SplitManifest
from salun_core.digest import sha256_file
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import RunFacts
from salun_core.models.checkpoint import SPLIT
from salun_core.registry.manifest import Lineage
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.storage.local_files import write_whole
from salun_core.tasks.classification.tuning import TUNING_LOG
from salun_core.tasks.resolve import AUTO
from salun_core.tasks.run_facts import RUN_FACTS, facts_json, read_run_facts
from salun_core.tasks.task import TuningOptions

CELL, EVIDENCE, REPORT, RUNS = "cell.json", "evidence.json", "report.html", "runs"
_APART = 1_000_003  # between the seeds of one cell's random masks


class CellNote(Document):
    """`cell.json`: what a cell was measured on, beside its evidence."""

    format: Literal["salun.bench-cell/v1"] = "salun.bench-cell/v1"
    plan: str
    inputs: str
    evidence: str
    seconds: float
    logs: dict[str, str] = Field(default={}, description="SHA-256 of each search's log, by file, in their order")
    own_passes: int | None = Field(default=None, description="of the chosen settings alone, where they were searched")
    lineage: Lineage | None = Field(default=None, description="debt after a sequence of requests")


def kept_cell(out: Path, cell: Cell) -> CellNote | None:
    """Return the note of a cell whose evidence is there as it was written, for the suite as it is; else None."""
    folder = out / "cells" / cell.name
    try:
        note = load(CellNote, folder / CELL)
        digests = {EVIDENCE: note.evidence, **note.logs}
        fits = note.plan == cell.plan and all(sha256_file(folder / name) == digests[name] for name in digests)
    except (UsageError, OSError):
        return None
    return note if fits else None


def measure_cell(preparation: Preparation, cell: Cell, ready: Ready, inputs: str) -> None:
    """Measure a cell, from its mask to its evidence.

    Args:
        preparation: of the suite, with the folder.
        cell: it.
        ready: what the cells of its seed share.
        inputs: digest of all that it hangs on.

    Raises:
        SalunError: it cannot be measured; nothing of it is left.
    """
    out = preparation.out
    work, target = out / "work" / cell.name, out / "cells" / cell.name
    started = time.perf_counter()
    try:
        (work / RUNS).mkdir(parents=True)
        course = _CellRun(preparation, cell, ready, work)
        course.run()
        shutil.rmtree(work / RUNS)
        note = course.note(inputs, time.perf_counter() - started)
        write_whole(work / CELL, (json.dumps(note.model_dump(), indent=1) + "\n").encode())
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.replace(target)
    finally:
        shutil.rmtree(out / "work", ignore_errors=True)


@dataclass
class _CellRun:
    """The requests of a cell, one after the other.

    Args:
        preparation: of the suite.
        cell: it.
        ready: what the cells of its seed share.
        work: its folder.
        facts: of the runs so far.
        logs: files of the searches' logs so far.
        alone: passes that each chosen setting alone costs.
        lineage: the debt so far.
    """

    preparation: Preparation
    cell: Cell
    ready: Ready
    work: Path
    facts: list[RunFacts] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    lineage: Lineage = field(default_factory=Lineage)

    @property
    def several(self) -> bool:
        """Whether it is a sequence."""
        return len(self.ready.requests) > 1

    def run(self) -> None:
        """Unlearn all requests and evaluate what they left."""
        model, mask = self.ready.base, None
        for number, forget in enumerate(self.ready.requests, start=1):
            context = self._context(model, forget)
            mask = self._mask(context, number)
            model = self._unlearn(context, mask, number)
        if self.several:  # no one mask is that of all the runs
            mask = None
            write_whole(model / RUN_FACTS, facts_json(together(self.facts)))
        context = self._context(self.ready.base, self.ready.forget)
        evidence, report = self.work / EVIDENCE, self.work / REPORT
        evaluate(context, model, evidence, report, mask=mask, reference=self.ready.reference)

    def _context(self, model: Path, forget: Path) -> RunContext:
        plan = self.preparation.plan
        return RunContext(model, str(forget), plan.suite.name, data=plan.moved)

    def note(self, inputs: str, seconds: float) -> CellNote:
        """Return what `cell.json` says."""
        return CellNote(
            plan=self.cell.plan,
            inputs=inputs,
            evidence=sha256_file(self.work / EVIDENCE),
            seconds=seconds,
            logs={name: sha256_file(self.work / name) for name in self.logs},
            own_passes=sum(self.alone) if self.alone else None,
            lineage=self.lineage if self.several else None,
        )

    def _mask(self, context: RunContext, number: int) -> Path | None:
        preparation, entry = self.preparation, self.cell.entry
        if entry.density is None or preparation.plan.search(entry):
            return None
        if not self.several:
            return preparation.mask(self.cell, self.ready)
        path = self.work / RUNS / f"mask-{number}.safetensors"
        compute_mask(context, self.cell.recipe, path, self._random_seed(number))
        return path

    def _unlearn(self, context: RunContext, mask: Path | None, number: int) -> Path:
        entry, after, tuning = self.cell.entry, self.work / RUNS / f"model-{number}", self._tuning(number)
        run_unlearning(context, self.cell.recipe, mask, after, tuning=tuning)
        if tuning is not None:
            self.logs.append(f"tuning-{number}.json" if self.several else TUNING_LOG)
            shutil.copyfile(after / TUNING_LOG, self.work / self.logs[-1])
        if self.several:
            before, left = (len(load(SplitManifest, folder / SPLIT).train) for folder in (context.before, after))
            since = self.lineage if self.lineage.trained_on else Lineage(trained_on=before)
            self.lineage = since.after_run(before - left)
        self.facts.append(read_run_facts(after, entry.method))
        return after

    def _tuning(self, number: int) -> TuningOptions | None:
        plan, entry = self.preparation.plan, self.cell.entry
        search = plan.search(entry)
        if search is None:
            return None
        policy = plan.policy(search)
        return TuningOptions(
            search.budget,
            policy or AUTO,
            bounded=policy is not None,
            density=entry.density,
            random_mask_seed=self._random_seed(number),
            on_chosen=self.alone.append,
        )

    def _random_seed(self, number: int) -> int | None:
        """The first request draws as a single one does; the later ones change other weights."""
        return self.cell.seed + _APART * (number - 1) if self.cell.entry.mask == "random" else None


def together(facts: Sequence[RunFacts]) -> RunFacts:
    """Return the facts of several runs, one after the other, as of one: no mask is that of all of them.

    Args:
        facts: in order; configuration and environment are the last one's, seconds, passes and history of all.
    """
    seconds = [run.seconds for run in facts]
    history = [record for run in facts for record in run.history]
    return facts[-1].model_copy(
        update={
            "density": None,
            "density_by_parameter": {},
            "seconds": {name: sum(run.get(name, 0.0) for run in seconds) for name in seconds[-1]},
            "passes": sum(run.passes or 0 for run in facts),
            "history": [item.model_copy(update={"epoch": at}) for at, item in enumerate(history, start=1)],
            "tuning": None,
            "changed_fraction": None,
        }
    )
