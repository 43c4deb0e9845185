"""Counts of a calibration: models judged, the JSON of the counts, and the page with the table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from lab.calibration import Cell, Sort, all_cells
from salun_core.config import Document, load
from salun_core.errors import UsageError, unknown_name
from salun_core.evaluation.statistics import wilson_interval
from salun_core.gate import Policy, decide, load_policy
from salun_core.storage.local_files import write_whole

BEGIN, END = "<!-- calibration -->", "<!-- /calibration -->"

GOAL = 0.95  # least share of honest models that pass, and of failed ones that do not


class Row(Document):
    """One population of one cell."""

    cell: str
    kind: str
    policy: str = Field(description="name of the policy that judged it")
    population: str
    sort: Sort
    samples: int = Field(ge=0, description="median size of the forget set; 0 if nothing is named by samples")
    models: int = Field(ge=1)
    retrained: int = Field(default=0, ge=0)
    measured: int = Field(ge=0)
    procedure: int = Field(ge=0)
    refused: int = Field(ge=0)
    rules: dict[str, int] = Field(description="rules that refused, and how many models each")
    figures: dict[str, tuple[float, float, float]] = Field(
        description="least, median and largest value of each metric that the policy judges"
    )


class Calibration(Document):
    """How often policies passed each population."""

    format: Literal["salun.calibration/v1"] = "salun.calibration/v1"
    policies: dict[str, str] = Field(description="digest of each policy by name")
    rows: list[Row]


def chosen_cells(names: Sequence[str] = ()) -> list[Cell]:
    """Return cells by name, all without a name; UsageError if one does not exist."""
    known = all_cells()
    for name in names:
        if name not in known:
            raise unknown_name("cell", name, known)
    return [cell for cell in known.values() if not names or cell.name in names]


def calibrate(
    names: Sequence[str] = (),
    models: int | None = None,
    policy: str | Path | None = None,
    workers: int = 1,
    on_cell: Callable[[str], None] = lambda name: None,
) -> Calibration:
    """Make the models of cells, judge each, and count the outcomes.

    `models` is the number of each population, by default as each cell says. A policy judges all cells, in place of the
    shipped ones; UsageError if they are of several kinds of model. `workers` has no influence on the result.
    """
    cells = chosen_cells(names)
    shipped = sorted({cell.policy for cell in cells})
    if policy is not None and len(shipped) > 1:
        raise UsageError(
            "one policy cannot judge all these cells",
            f"their models have different policies: {', '.join(shipped)}",
            "choose cells of one kind of model: --cells NAME",
        )
    policies = {name: load_policy(policy or name) for name in shipped}
    jobs = [(cell.name, models or cell.models, policies[cell.policy]) for cell in cells]
    rows: list[Row] = []
    with _mapped(min(workers, len(jobs))) as run:
        for cell, found in zip(cells, run(_rows_of, *zip(*jobs, strict=True)), strict=True):
            rows += found
            on_cell(cell.name)
    return Calibration(policies={found.name: found.digest for found in policies.values()}, rows=rows)


@contextmanager
def _mapped(workers: int) -> Iterator[Callable[..., Iterator[list[Row]]]]:
    """Yield a `map` over so many processes; with one worker, this one."""
    if workers < 2:
        yield map
        return
    # `spawn`: a process whose torch has started its threads must not be forked.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map


def _rows_of(name: str, models: int, policy: Policy) -> list[Row]:
    """Measure one cell."""
    import torch

    threads, cell = torch.get_num_threads(), all_cells()[name]
    torch.set_num_threads(1)  # small nets: a second thread costs more than it saves, and the bits would depend on it
    judged = {rule.metric for rule in policy.rules}
    sorts: dict[str, Sort] = {}
    sizes: dict[str, list[int]] = {}
    outcomes: dict[str, Counter[str]] = {}
    rules: dict[str, Counter[str]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    try:
        for population, sort, evidence in cell.measure(models):
            decision = decide(evidence, policy)
            sorts[population] = sort
            sizes.setdefault(population, []).append(evidence.forgotten.count)
            outcomes.setdefault(population, Counter())[decision.level or "refused"] += 1
            failed = {verdict.rule for verdict in decision.verdicts if not verdict.passed}
            rules.setdefault(population, Counter()).update(failed)
            for metric in sorted(judged & set(evidence.metrics)):
                if (value := evidence.metrics[metric].after) is not None:
                    values.setdefault(population, {}).setdefault(metric, []).append(value)
    finally:
        torch.set_num_threads(threads)
    return [
        Row(
            cell=cell.name,
            kind=cell.kind,
            policy=policy.name,
            population=population,
            sort=sorts[population],
            samples=int(np.median(sizes[population])),
            models=found.total(),
            **{outcome: found[outcome] for outcome in ("retrained", "measured", "procedure", "refused")},
            rules=dict(sorted(rules[population].items(), key=lambda item: (-item[1], item[0]))),
            figures={name: _spread(found) for name, found in values.get(population, {}).items()},
        )
        for population, found in outcomes.items()
    ]


def _spread(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = (round(float(value), 4) for value in np.quantile(values, [0, 0.5, 1]))
    return low, middle, high


def columns(row: Row) -> list[str]:
    """Return a row of the table as text: request, model, models, each outcome, and the rules that refused most."""
    refused = row.refused / row.models
    low, high = wilson_interval(refused, row.models)
    by = ", ".join(f"{rule} ({count})" for rule, count in list(row.rules.items())[:4])
    share = f"{refused:.0%} [{low:.0%}, {high:.0%}]"
    counts = (row.models, row.retrained, row.measured, row.procedure)
    return [row.cell, row.population, row.sort, *map(str, counts), share, by]


HEADINGS = ("request", "model", "kind", "n", "retrained", "measured", "procedure", "refused [95 %]", "by")


def markdown(calibration: Calibration) -> str:
    """Return what is on the page: by how many samples each kind of model is told, goals that are missed, all counts."""
    digests = "; ".join(f"`{name}` {digest[:12]}" for name, digest in sorted(calibration.policies.items()))
    policies = list(dict.fromkeys(row.policy for row in calibration.rows))
    missed = [f"- {line}" for row in calibration.rows for line in missed_goals(row)]
    lines = [f"Digests of the policies: {digests}.", "", "### By how many samples each kind can be told", ""]
    lines += ["Share of the models that the gate refuses, and of retrained ones also the share that is `measured`.", ""]
    for policy in policies:
        lines += [*_told([row for row in calibration.rows if row.policy == policy]), ""]
    lines += ["### Goals that are missed", "", *(missed or ["None."]), "", "### All counts", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", "|---|---|---|--:|--:|--:|--:|--:|---|"]
    lines += [f"| {' | '.join(columns(row))} |" for row in calibration.rows]
    return "\n".join(lines)


def _told(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table with a row for each population and a column for each cell."""
    cells = list(dict.fromkeys(row.cell for row in rows))
    sizes = {row.cell: row.samples for row in rows}
    titles = [cell if f"{sizes[cell]} " in cell or not sizes[cell] else f"{cell} ({sizes[cell]})" for cell in cells]
    found = {(row.population, row.cell): row for row in rows}
    lines = [f"| model | {' | '.join(titles)} |", f"|---|{'--:|' * len(cells)}"]
    for sort in get_args(Sort):
        for population in dict.fromkeys(row.population for row in rows if row.sort == sort):
            of_cells = [found.get((population, cell)) for cell in cells]
            lines.append(f"| {population} | {' | '.join('' if row is None else _told_in(row) for row in of_cells)} |")
    return lines


def _told_in(row: Row) -> str:
    refused = f"{row.refused / row.models:.0%}"
    return f"{refused} (measured {row.measured / row.models:.0%})" if row.sort == "honest" else refused


def missed_goals(row: Row) -> list[str]:
    """Return in words which goals a population misses: honest models pass, all others are refused, none is `measured`.

    Methods of the product have no goal here: what they reach is a figure of their recipe.
    """
    where, lines = f"{row.cell}, {row.population}", list[str]()
    if row.sort == "honest" and row.refused > (1 - GOAL) * row.models + 1e-9:
        lines.append(f"{where}: {row.refused} of {row.models} are refused")
    if row.sort in ("failed", "forgery"):
        passed, allowed = row.models - row.refused, 0.0 if row.sort == "forgery" else 1 - GOAL
        if row.measured or passed > allowed * row.models + 1e-9:
            lines.append(f"{where}: of {row.models} pass {row.procedure} as `procedure`, {row.measured} as `measured`")
    return lines


def read_calibration(path: Path) -> Calibration:
    """Read the JSON of a calibration."""
    return load(Calibration, path)


def written(calibration: Calibration) -> bytes:
    """Return the JSON of a calibration."""
    document: dict[str, Any] = calibration.model_dump(mode="json")
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def merged(old: Calibration, new: Calibration) -> Calibration:
    """Return an earlier calibration with the cells of a new one in place of its own, in the order of all cells.

    UsageError: cells that stay were judged by another version of a policy.
    """
    fresh = {row.cell for row in new.rows}
    kept = [row for row in old.rows if row.cell not in fresh]
    for name in sorted({row.policy for row in kept} & set(new.policies)):
        if old.policies.get(name) != new.policies[name]:
            raise UsageError(
                f"the other cells were judged by another version of the policy {name}",
                "one file holds the counts of one version",
                "measure all cells of this policy, or give another file",
            )
    names = list(all_cells())
    place = {name: number for number, name in enumerate(names)}
    rows = sorted([*kept, *new.rows], key=lambda row: place.get(row.cell, len(names)))
    policies = {**{row.policy: old.policies[row.policy] for row in kept}, **new.policies}
    return Calibration(policies=dict(sorted(policies.items())), rows=rows)


def write_page(page: Path, calibration: Calibration) -> None:
    """Replace the table of a page; the text outside the two markers stays. UsageError if the page lacks the markers."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{page} has no place for the table", f"it lacks {BEGIN} or {END}", "add each on its own line")
    write_whole(page, f"{before}{BEGIN}\n\n{markdown(calibration)}\n\n{END}{after}".encode())
