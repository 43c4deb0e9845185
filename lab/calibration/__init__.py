"""Calibration of the gate: how often a policy passes honest models, failed ones and forgeries.

A cell is one kind of request. It makes models and evaluates them. Counting, the JSON and the page (`table`) do not know
what kind of model it is:

    populations  the cells of classifiers: models before, retrained ones, and those of the product's own methods
    forgeries    changes of a classifier that forget nothing, or reveal what they forgot
    diffusion    the cells of diffusion models, with their forgeries
    table        models judged -> counts by cell and population -> JSON and page
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from salun_core.evaluation.evidence import Evidence

Sort = Literal["honest", "own", "failed", "forgery"]
"""`honest`: retrained without the forget set, the exact answer. `own`: unlearned with a method of the product.
`failed`: an attempt that forgot too little or too much. `forgery`: a change that only looks like forgetting."""


class Judged(NamedTuple):
    """One model of a population, such as `noise of 0.05`, and its evidence, as if it had been unlearned.

    `sort` is what the gate should say about it.
    """

    population: str
    sort: Sort
    evidence: Evidence


@dataclass(frozen=True)
class Cell:
    """One kind of request, with the shipped policy that judges it by default.

    `models` is the default number of each population; `measure` makes so many of each and returns all of all
    populations, the same ones in every call.
    """

    name: str
    kind: str
    policy: str
    models: int
    measure: Callable[[int], Iterator[Judged]]


def all_cells() -> Mapping[str, Cell]:
    """Return all cells by name. Nothing is trained before a cell is measured."""
    from lab.calibration.diffusion import diffusion_cells
    from lab.calibration.populations import classifier_cells

    return {cell.name: cell for cell in (*classifier_cells(), *diffusion_cells())}
