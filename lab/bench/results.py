"""The figures of a suite, `salun.bench/v1`, read from the evidence of its cells."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from lab.bench.cell import CellNote, kept_cell
from lab.bench.plan import Cell, SuiteRun
from lab.bench.prepared import EVIDENCE, SharedArtifact, further_reference, reference_name
from salun_core.config import Document, load
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.statistics import mean_interval
from salun_core.tuning import TuningLog

FORMAT = "salun.bench/v1"
CLASSIFIER_METRICS = ("UA", "RA", "TA", "MIA")
GENERATED_METRICS = ("UA", "RA", "FID", "KID")
OPTIONAL_METRICS = ("neighbours", "CLIP", "nudity", "UA_relearned", "attack_success")
ORIGINAL, RETRAIN = "original", "Retrain"
TIE = 1.0  # points of the average gap: the most that two rows may differ by if their interval contains 0
Setting = float | str
_SOMETIMES = {"chosen", "tried", "search_passes", "search_seconds", "own_passes", "debt", "runs", "reference"}
_Values = dict[str, float | None]


class Figures(Document):
    """Figures of one row at one seed, or of one of the seed's references."""

    seed: int
    values: dict[str, float | None] = Field(description="by metric, in the evidence's own units")
    gap: float | None = Field(default=None, description="mean distance to the seed's references, as a ratio")
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
    reference: int | None = Field(
        default=None, ge=0, description="number of the reference, if a seed has several; its gap is to the others"
    )

    @model_serializer(mode="wrap")
    def _without_absent_facts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the facts of a search, of a sequence or of several references if there was none."""
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

    @property
    def floor(self) -> float | None:
        """The mean gap of a reference to the others of its seed, in points; None if a seed has only one.

        Two rows that differ by less differ by less than two retrainings with other seeds.
        """
        row = next((row for row in self.rows if row.name == RETRAIN), None)
        if row is None or any(item.reference is None or item.gap is None for item in row.figures):
            return None
        return statistics.mean(gaps_of(row).values())

    @property
    def best(self) -> frozenset[str]:
        """The row of a method with the smallest gap and all that are tied with it; empty if all are."""
        return best_rows({row.name: gaps_of(row) for row in self.rows if row.method is not None}, self.floor)


def known(row: ResultRow, name: str) -> list[float]:
    """Return the values of a field of a row, one per seed (the mean of its references), without the missing ones."""
    found: dict[int, list[float]] = {}
    for item in row.figures:
        if (value := getattr(item, name)) is not None:
            found.setdefault(item.seed, []).append(value)
    return [statistics.mean(values) for values in found.values()]


def gaps_of(row: ResultRow) -> dict[int, float]:
    """Return a row's gap by seed, in points."""
    seeds = dict.fromkeys(item.seed for item in row.figures if item.gap is not None)
    return {seed: 100 * gap for seed, gap in zip(seeds, known(row, "gap"), strict=True)}


def best_rows(gaps: Mapping[str, Mapping[int, float]], floor: float | None) -> frozenset[str]:
    """Return the row with the smallest mean gap, and all rows that are tied with it.

    Gaps and floor are in points. A row is tied if the mean difference lies inside the floor, or if it is at most `TIE`
    and the paired interval contains 0. A row that is further away on average is no tie, however much it varies: a
    method that fails at one seed of three has an interval that contains 0, too.

    Empty without a floor, and if all rows are tied: marking all would say nothing.
    """
    measured = {name: of for name, of in gaps.items() if of}
    if floor is None or not measured:
        return frozenset()
    best = measured[smallest(measured)]
    tied = {name for name, of in measured.items() if _tied(of, best, floor)}
    return frozenset(tied) if len(tied) < len(measured) else frozenset()


def smallest(gaps: Mapping[str, Mapping[int, float]]) -> str:
    """Return the name with the smallest mean gap; the first one if several have it."""
    return min(gaps, key=lambda name: statistics.mean(gaps[name].values()))


def _tied(gaps: Mapping[int, float], best: Mapping[int, float], floor: float) -> bool:
    mean, interval = difference(gaps, best)
    if mean is None or interval is None:
        return True
    return mean <= max(floor, TIE) if interval[0] <= 0 else mean <= floor


def difference(gaps: Mapping[int, float], best: Mapping[int, float]) -> tuple[float | None, tuple[float, float] | None]:
    """Return the mean difference of two rows over the seeds that both have, in points, and its 95 % interval.

    The interval is Student's t. The seeds are paired: they share base, forget set and references, whose noise cancels
    out. The mean is None without a shared seed, the interval with fewer than two.
    """
    paired = [gaps[seed] - best[seed] for seed in gaps if seed in best]
    return (
        statistics.mean(paired) if paired else None,
        mean_interval(paired) if len(paired) > 1 else None,
    )


def collect(plan: SuiteRun, out: Path) -> Results:
    """Read the figures of all cells that exist, whichever rows and seeds were chosen to be measured.

    UsageError if no cell was measured.
    """
    whole = SuiteRun(plan.suite, plan.size_name, plan.folder, plan.data_override)
    found = [
        (cell, note, load(Evidence, out / "cells" / cell.name / EVIDENCE))
        for cell in whole.cells
        if (note := kept_cell(out, cell)) is not None
    ]
    if not found:
        raise UsageError(f"{out} holds no cell of this suite", "no cell was measured with its settings", "run it first")
    latest: dict[int, Evidence] = {}
    for cell, _, evidence in found:
        if cell.seed not in latest or evidence.created_at > latest[cell.seed].created_at:
            latest[cell.seed] = evidence
    # A seed's cells are compared only if they have the goal of the newest one: a run that was killed after a reference
    # was trained again leaves cells of both. The next run measures the older ones again.
    found = [(cell, note, evidence) for cell, note, evidence in found if _goal(evidence) == _goal(latest[cell.seed])]
    seeds = {seed: latest[seed] for seed in whole.seeds if seed in latest}
    references, absent = _references(whole, seeds, out)
    rows = [_original(seeds, references), *_retrained(references)]
    for entry in whole.size.methods:
        figures = [
            _after(cell, note, evidence, out, references) for cell, note, evidence in found if cell.entry == entry
        ]
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
        missing=[*(cell.name for cell in whole.cells if cell.name not in measured), *absent],
    )


def _values(evidence: Evidence, model: str) -> _Values:
    return {name: getattr(item, model) for name, item in evidence.metrics.items() if name != "gap"}


def _goal(evidence: Evidence) -> tuple[str | None, ...]:
    """The models and the forget set that all cells of a seed share."""
    measured = evidence.measured
    return measured.before, measured.forget_set, measured.reference


def _gap(values: _Values, references: Sequence[_Values]) -> float | None:
    """Return the average gap to a seed's references: the mean over them of the mean |UA, RA, TA, MIA - retrained|.

    It is the mean of the distances, not the distance to the mean of the references. So a method that equals retraining
    has the floor as its expected gap, with any number of references, and figures of one reference remain comparable.

    A ratio, or None if there is no reference or a value is missing.
    """
    gaps: list[float] = []
    for reference in references:
        pairs = [(values.get(name), reference.get(name)) for name in CLASSIFIER_METRICS]
        distances = [abs(value - goal) for value, goal in pairs if value is not None and goal is not None]
        if len(distances) < len(pairs):
            return None
        gaps.append(sum(distances) / len(distances))
    return statistics.mean(gaps) if gaps else None


def _original(seeds: dict[int, Evidence], references: dict[int, list[Figures]]) -> ResultRow:
    """The base model; one that all seeds share, with one forget set, counts once."""
    figures: dict[tuple[str, str], Figures] = {}
    for seed, evidence in seeds.items():
        values = _values(evidence, "before")
        one = Figures(seed=seed, values=values, gap=_gap(values, [item.values for item in references.get(seed, [])]))
        figures.setdefault((evidence.measured.before, evidence.measured.forget_set), one)
    return ResultRow(name=ORIGINAL, figures=list(figures.values()))


def _references(plan: SuiteRun, seeds: dict[int, Evidence], out: Path) -> tuple[dict[int, list[Figures]], list[str]]:
    """Return the references of each seed, and the names of those that were not measured.

    Every seed gets as many as the seed with the fewest, so that no table mixes gaps to different numbers of references.
    """
    found: dict[int, list[Figures]] = {}
    absent = []
    for seed, evidence in seeds.items():
        note = out / f"{reference_name(seed, 0)}.json"
        if evidence.measured.reference is None or not note.is_file():
            continue
        spent = load(SharedArtifact, note)
        values = _values(evidence, "reference")
        found[seed] = [Figures(seed=seed, values=values, seconds=spent.seconds, passes=spent.passes)]
        for number in range(1, plan.size.references):
            other = further_reference(out, seed, number)
            if other is None or _goal(other[1]) != _goal(evidence):
                absent.append(reference_name(seed, number))
            elif len(found[seed]) == number:  # without a hole
                spent, values = other[0], _values(other[1], "after")
                found[seed].append(Figures(seed=seed, values=values, seconds=spent.seconds, passes=spent.passes))
    count = min((len(items) for items in found.values()), default=0)
    return {seed: items[:count] for seed, items in found.items()}, absent


def _retrained(references: dict[int, list[Figures]]) -> list[ResultRow]:
    """The retrained models, if they were measured, each with its gap to the others of its seed."""
    figures = []
    for items in references.values():
        for number, item in enumerate(items):
            others = [other.values for other in items if other is not item] or [item.values]  # a single one: 0
            known_number = number if len(items) > 1 else None
            figures.append(item.model_copy(update={"gap": _gap(item.values, others), "reference": known_number}))
    return [ResultRow(name=RETRAIN, figures=figures)] if figures else []


def _after(cell: Cell, note: CellNote, evidence: Evidence, out: Path, references: dict[int, list[Figures]]) -> Figures:
    spent, values = evidence.run.seconds, _values(evidence, "after")
    return Figures(
        seed=cell.seed,
        values=values,
        gap=_gap(values, [item.values for item in references.get(cell.seed, [])]),
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
    names = list(dict.fromkeys(name for one in each for name in one))
    chosen = each[0] if len(logs) == 1 else {name: [one.get(name, "-") for one in each] for name in names}
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
    method = {} if trial.method == log.method else {"method": trial.method}
    return {**method, **trial.settings, **density, "epochs": trial.epochs}


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
