"""The figures of a suite, `salun.bench/v1`, read from the evidence of its cells."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from salun_core.bench.cell import EVIDENCE, CellNote, kept_cell
from salun_core.bench.plan import Cell, SuiteRun
from salun_core.bench.prepared import SharedArtifact
from salun_core.config import Document, load
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.statistics import average_gap
from salun_core.tuning import TuningLog

FORMAT = "salun.bench/v1"
CLASSIFIER_METRICS = ("UA", "RA", "TA", "MIA")
GENERATED_METRICS = ("UA", "RA", "FID", "KID")
OPTIONAL_METRICS = ("neighbours", "CLIP", "nudity", "UA_relearned", "attack_success")
ORIGINAL, RETRAIN = "original", "Retrain"
Setting = float | str
_SOMETIMES = {"chosen", "tried", "search_passes", "search_seconds", "own_passes", "debt", "runs"}


class Figures(Document):
    """Figures of one row at one seed."""

    seed: int
    values: dict[str, float | None] = Field(description="by metric, in the evidence's own units")
    gap: float | None = Field(default=None, description="mean distance to the retrained model, as a ratio")
    seconds: float | None = Field(default=None, description="wall clock of mask and unlearning")
    passes: int | None = Field(default=None, description="examples forward and backward, mask included")
    evidence: str | None = Field(default=None, description="SHA-256 of the evidence file")
    inputs: str | None = Field(default=None, description="digest of everything that the cell depends on")
    chosen: dict[str, Setting | list[Setting]] | None = Field(
        default=None, description="settings that a search chose; of a sequence one value per request"
    )
    tried: int | None = Field(default=None, ge=1, description="trials of the search")
    search_passes: int | None = Field(default=None, description="of all trials, their measurements and the scores")
    search_seconds: float | None = Field(default=None, description="wall clock of the search")
    own_passes: int | None = Field(default=None, description="of the chosen settings alone, their scores included")
    debt: float | None = Field(default=None, description="share of the training data that a sequence forgot")
    runs: int | None = Field(default=None, description="unlearning runs of a sequence")

    @model_serializer(mode="wrap")
    def _without_absent_facts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the facts of a search or of a sequence if there was none."""
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if value is not None or name not in _SOMETIMES}


class ResultRow(Document):
    """One row of the table."""

    name: str
    method: str | None = Field(default=None, description="null for the model before and for the retrained one")
    mask: Literal["saliency", "random", "none"] = "none"
    density: float | None = None
    config: dict[str, Any] = {}
    figures: list[Figures] = []


class Results(Document):
    """All figures of a suite at one size."""

    format: Literal["salun.bench/v1"] = "salun.bench/v1"
    suite: str
    size: str
    title: str
    about: str
    kind: Literal["classification", "class-conditional", "text-to-image"]
    command: str = Field(description="that measures it")
    settings: dict[str, Any] = Field(description="of the size, from the suite, without its rows")
    extractor: str | None = Field(default=None, description="whose features FID and KID compare")
    images: int | None = Field(default=None, description="generated images by model")
    environment: dict[str, str] = Field(description="versions, device, threads; several values if cells differ")
    machine: str = Field(description="processor and cores")
    rows: list[ResultRow]
    missing: list[str] = Field(default=[], description="cells that were not measured")

    @property
    def metrics(self) -> list[str]:
        """The columns: those of the kind, and the optional ones that were measured."""
        fixed = CLASSIFIER_METRICS if self.kind == "classification" else GENERATED_METRICS
        found = {name for row in self.rows for item in row.figures for name, value in item.values.items() if value}
        return [*fixed, *(name for name in OPTIONAL_METRICS if name in found)]

    @property
    def searched(self) -> bool:
        """Whether the settings of a row were searched for."""
        return any(item.chosen is not None for row in self.rows for item in row.figures)


def known(row: ResultRow, name: str) -> list[float]:
    """Return the values of a field of a row's figures, without the missing ones."""
    return [value for item in row.figures if (value := getattr(item, name)) is not None]


def collect(plan: SuiteRun, out: Path) -> Results:
    """Read the figures of all cells that exist.

    Args:
        plan: the suite; all its rows and seeds are read, whichever were chosen to be measured.
        out: folder of the run.

    Raises:
        UsageError: no cell was measured.
    """
    whole = SuiteRun(plan.suite, plan.size_name, plan.folder, plan.data_override)
    found = [
        (cell, note, load(Evidence, out / "cells" / cell.name / EVIDENCE))
        for cell in whole.cells
        if (note := kept_cell(out, cell)) is not None
    ]
    if not found:
        raise UsageError(f"{out} holds no cell of this suite", "no cell was measured with its settings", "run it first")
    first = {cell.seed: evidence for cell, _, evidence in reversed(found)}
    seeds = {seed: first[seed] for seed in whole.seeds if seed in first}
    rows = [_original(seeds), *_reference(seeds, out)]
    for entry in whole.size.methods:
        figures = [_after(cell, note, evidence, out) for cell, note, evidence in found if cell.entry == entry]
        if figures:
            fields = entry.model_dump(include={"name", "method", "mask", "density", "config"})
            rows.append(ResultRow(**fields, figures=figures))
    generation = found[0][2].generation
    settings = whole.size.model_dump(mode="json", exclude={"methods"}, exclude_none=True, exclude_defaults=True)
    measured = {cell.name for cell, _, _ in found}
    return Results(
        suite=whole.suite.name,
        size=whole.size_name,
        title=whole.suite.title,
        about=whole.suite.about,
        kind=whole.suite.kind,
        command=f"salun bench run {whole.suite.name} --size {whole.size_name}",
        settings=settings,
        extractor=generation.extractor if generation else None,
        images=generation.images if generation else None,
        environment=_environment(evidence.run.environment for _, _, evidence in found),
        machine=machine(),
        rows=rows,
        missing=[cell.name for cell in whole.cells if cell.name not in measured],
    )


def _values(evidence: Evidence, model: str) -> dict[str, float | None]:
    return {name: getattr(item, model) for name, item in evidence.metrics.items() if name != "gap"}


def _original(seeds: dict[int, Evidence]) -> ResultRow:
    """The base model; one that all seeds share, with one forget set, counts once."""
    figures: dict[tuple[str, str], Figures] = {}
    for seed, evidence in seeds.items():
        one = Figures(seed=seed, values=_values(evidence, "before"), gap=average_gap(evidence.metrics, "before"))
        figures.setdefault((evidence.measured.before, evidence.measured.forget_set), one)
    return ResultRow(name=ORIGINAL, figures=list(figures.values()))


def _reference(seeds: dict[int, Evidence], out: Path) -> list[ResultRow]:
    """The retrained model, if it was measured."""
    figures = []
    for seed, evidence in seeds.items():
        note = out / f"reference-{seed}.json"
        if evidence.measured.reference is None or not note.is_file():
            continue
        spent = load(SharedArtifact, note)
        gap = 0.0 if average_gap(evidence.metrics) is not None else None
        values = _values(evidence, "reference")
        figures.append(Figures(seed=seed, values=values, gap=gap, seconds=spent.seconds, passes=spent.passes))
    return [ResultRow(name=RETRAIN, figures=figures)] if figures else []


def _after(cell: Cell, note: CellNote, evidence: Evidence, out: Path) -> Figures:
    spent = evidence.run.seconds
    return Figures(
        seed=cell.seed,
        values=_values(evidence, "after"),
        gap=average_gap(evidence.metrics),
        seconds=spent.get("mask", 0.0) + spent.get("unlearn", 0.0),
        passes=evidence.run.passes,
        evidence=note.evidence,
        inputs=note.inputs,
        **_search_facts([load(TuningLog, out / "cells" / cell.name / name) for name in note.logs]),
        own_passes=note.own_passes,
        debt=note.lineage.debt if note.lineage else None,
        runs=note.lineage.runs_since_training if note.lineage else None,
    )


def _search_facts(logs: Sequence[TuningLog]) -> dict[str, Any]:
    if not logs:
        return {}
    each = [_chosen(log) for log in logs]
    chosen = each[0] if len(logs) == 1 else {name: [one[name] for one in each] for name in each[0]}
    return {
        "chosen": chosen,
        "tried": sum(len(log.trials) for log in logs),
        "search_passes": sum(log.passes for log in logs),
        "search_seconds": sum(log.seconds for log in logs),
    }


def _chosen(log: TuningLog) -> dict[str, Setting]:
    assert log.chosen is not None  # a cell has a model
    trial = log.trials[log.chosen]
    density = {} if trial.density is None else {"density": trial.density}
    return {**trial.settings, **density, "epochs": trial.epochs}


def _environment(facts: Iterable[dict[str, str]]) -> dict[str, str]:
    values: dict[str, list[str]] = {}
    for fact in facts:
        for name, value in fact.items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: " or ".join(found) for name, found in sorted(values.items())}


def machine() -> str:
    """Describe this machine by its processor and cores, without its name."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} core{'s' if cores != 1 else ''}"
