"""Measures one cell: mask or search, unlearning and evaluation, for each request. Its folder is complete or missing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from lab.bench.plan import Cell
from lab.bench.prepared import EVIDENCE, REPORT, Preparation, Ready
from salun_core.config import Document, load
from salun_core.data.split import read_split
from salun_core.digest import sha256_file
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import RunFacts
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

CELL, RUNS = "cell.json", "runs"
_SEED_STEP = 1_000_003  # between the random masks of a sequence; larger than the seeds of a suite


class CellNote(Document):
    """`cell.json`, next to a cell's evidence: what it was measured on."""

    format: Literal["salun.bench-cell/v1"] = "salun.bench-cell/v1"
    plan: str
    inputs: str
    evidence: str
    seconds: float
    logs: dict[str, str] = Field(default={}, description="SHA-256 of each search's log, by file, in order")
    own_passes: int | None = Field(default=None, description="of the chosen settings alone, if they were searched for")
    lineage: Lineage | None = Field(default=None, description="debt after a sequence of requests")


def kept_cell(out: Path, cell: Cell) -> CellNote | None:
    """Return the note of a cell that was measured with the current suite and whose files are unchanged; else None."""
    folder = out / "cells" / cell.name
    try:
        note = load(CellNote, folder / CELL)
        files = {EVIDENCE: note.evidence, **note.logs}
        unchanged = all(sha256_file(folder / name) == digest for name, digest in files.items())
    except (UsageError, OSError):
        return None
    return note if unchanged and note.plan == cell.plan else None


def measure_cell(preparation: Preparation, cell: Cell, ready: Ready, inputs: str) -> None:
    """Measure a cell, from its mask to its evidence.

    `inputs` is the digest of everything that the cell depends on; if it cannot be measured, nothing of it is left.
    """
    work, target = preparation.out / "work" / cell.name, preparation.out / "cells" / cell.name
    try:
        (work / RUNS).mkdir(parents=True)
        note = _measured(preparation, cell, ready, inputs, work)
        shutil.rmtree(work / RUNS)
        write_whole(work / CELL, (json.dumps(note.model_dump(), indent=1) + "\n").encode())
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.replace(target)
    finally:
        shutil.rmtree(preparation.out / "work", ignore_errors=True)


def _measured(preparation: Preparation, cell: Cell, ready: Ready, inputs: str, work: Path) -> CellNote:
    """Unlearn all requests in sequence, evaluate the result, and describe the cell."""
    started, plan, entry = time.perf_counter(), preparation.plan, cell.entry
    sequence, search = len(ready.requests) > 1, plan.search(entry)
    facts, logs, own_passes = list[RunFacts](), list[str](), list[int]()
    model, mask, lineage = ready.base, None, Lineage()

    def context(before: Path, forget: Path) -> RunContext:
        return RunContext(before, str(forget), plan.suite.name, data=plan.data_override)

    for number, forget in enumerate(ready.requests, start=1):
        step, after, tuning = context(model, forget), work / RUNS / f"model-{number}", None
        # The first request draws the same random mask as a single request; the later ones change other weights.
        seed = cell.seed + _SEED_STEP * (number - 1) if entry.mask == "random" else None
        if search is not None:
            policy = plan.policy(search)
            tuning = TuningOptions(
                search.budget,
                policy or AUTO,
                bounded=policy is not None,
                density=entry.density,
                random_mask_seed=seed,
                on_chosen=own_passes.append,
            )
        elif not sequence:
            mask = preparation.mask(cell, ready)
        elif entry.density is not None:
            mask = work / RUNS / f"mask-{number}.safetensors"
            compute_mask(step, cell.recipe, mask, seed)
        run_unlearning(step, cell.recipe, mask, after, tuning=tuning)
        if tuning is not None:
            logs.append(f"tuning-{number}.json" if sequence else TUNING_LOG)
            shutil.copyfile(after / TUNING_LOG, work / logs[-1])
        if sequence:
            before, left = (len(read_split(folder).train) for folder in (model, after))
            lineage = (lineage if lineage.trained_on else Lineage(trained_on=before)).after_run(before - left)
        facts.append(read_run_facts(after, entry.method))
        model = after
    if sequence:  # it has no single mask that all of its runs used
        mask = None
        write_whole(model / RUN_FACTS, facts_json(merged_facts(facts)))
    whole = context(ready.base, ready.forget)
    evaluate(whole, model, work / EVIDENCE, work / REPORT, mask=mask, reference=ready.reference)
    return CellNote(
        plan=cell.plan,
        inputs=inputs,
        evidence=sha256_file(work / EVIDENCE),
        seconds=time.perf_counter() - started,
        logs={name: sha256_file(work / name) for name in logs},
        own_passes=sum(own_passes) if own_passes else None,
        lineage=lineage if sequence else None,
    )


def merged_facts(facts: Sequence[RunFacts]) -> RunFacts:
    """Merge the facts of several runs in sequence, which share no mask.

    Configuration and environment are the last one's; seconds, passes and history those of all.
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
