"""The cells of a suite: one for each row and seed, with a digest of everything that it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.bench.suite import Search, Size, Suite, SuiteEntry
from salun_core import plugins
from salun_core.data import DataSpec
from salun_core.data.spec import relative_to, relocated_spec
from salun_core.digest import digest_json
from salun_core.errors import UsageError, unknown_name
from salun_core.gate import load_policy
from salun_core.methods.recipe import Recipe
from salun_core.tasks.resolve import AUTO
from salun_core.tuning.space import methods_of

# A cell does not depend on these. It is measured against the first reference of its seed, whatever their number.
_NOT_MEASURED = {"methods", "seeds", "budget_seconds", "search", "references"}

# Part of every digest that depends on a reference. Earlier references began from the base's first weights: cells that
# were measured against them do not count any more, so that no table mixes the two kinds.
REFERENCE_KIND = "first weights of their own"

UNBOUNDED = "none"  # in suites only: a pipeline always has a policy


@dataclass(frozen=True)
class Cell:
    """One row at one seed; `plan` is the digest of everything that the suite specifies about this cell."""

    entry: SuiteEntry
    seed: int
    plan: str

    @property
    def recipe(self) -> Recipe:
        """The recipe of its runs; the density counts only if the row has one."""
        entry = self.entry
        density = 1.0 if entry.density is None else entry.density
        return Recipe(method=entry.method, density=density, method_config=dict(entry.config), seed=self.seed)

    @property
    def name(self) -> str:
        """The cell's folder."""
        return f"{self.entry.slug}-{self.seed}"


@dataclass(frozen=True)
class SuiteRun:
    """A suite at one size, cpu or paper, with the rows and seeds to measure; an empty `only` means all rows.

    Paths of the suite are relative to `folder`, that of its file.
    """

    suite: Suite
    size_name: str
    folder: Path = Path()
    data_override: str | None = None
    only: Sequence[str] = ()
    seed_count: int | None = None

    @cached_property
    def size(self) -> Size:
        """The size, with its rows."""
        return self.suite.size(self.size_name)

    @property
    def data(self) -> DataSpec | None:
        """The data set on this machine."""
        spec = self.size.data
        return relocated_spec(relative_to(spec, self.folder), self.data_override) if spec else None

    def path(self, text: str) -> Path:
        """Return a path of the suite relative to the working directory."""
        return self.folder / text

    @property
    def seeds(self) -> list[int]:
        """The seeds to measure; UsageError if the suite has fewer."""
        count, seeds = self.seed_count, self.size.seeds
        if count is not None and not 1 <= count <= len(seeds):
            raise UsageError(f"there are no {count} seeds", f"{self.suite.name} has {len(seeds)}", "give fewer")
        return seeds[:count]

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, ordered by seed, so that an interrupted run has whole tables of the first seeds.

        UsageError if a chosen row does not exist.
        """
        rows = self.size.methods
        names = {entry.slug: entry for entry in rows} | {entry.name: entry for entry in rows}
        if unknown := [name for name in self.only if name not in names]:
            raise unknown_name("row", unknown[0], [entry.name for entry in rows])
        chosen = [names[name] for name in self.only] or rows
        return [self.cell(entry, seed) for seed in self.seeds for entry in chosen]

    def cell(self, entry: SuiteEntry, seed: int) -> Cell:
        """Return the cell of a row at a seed."""
        measured = self.size.model_dump(mode="json", exclude=_NOT_MEASURED)
        own = entry.model_dump(mode="json", exclude={"name", "search", "budget"})
        searched: list[str] = []
        if search := self.search(entry):
            policy = self.policy(search)
            digest = load_policy("classifier" if policy == AUTO else policy).digest if policy else ""
            searched = [search.budget, digest]
        methods = methods_of(entry.method)
        code = [record.digest for record in plugins.loaded("method", *methods)]  # loaded when the suite was checked
        searched += methods if len(methods) > 1 else []  # another portfolio is another search
        goal = [REFERENCE_KIND] if self.size.retrain is not None else []
        return Cell(entry, seed, digest_json([self.suite.kind, measured, own, seed, *searched, *code, *goal]))

    def search(self, entry: SuiteEntry) -> Search | None:
        """Return the search for the settings of a row; None if it runs as written."""
        search = self.size.search if entry.search else None
        return search.model_copy(update={"budget": entry.budget}) if search and entry.budget else search

    def policy(self, search: Search) -> str | None:
        """Return the policy that bounds a search, as `TuningOptions` takes it; None if none does."""
        if search.policy == UNBOUNDED:
            return None
        name = search.policy
        return str(self.path(name)) if name.endswith((".yaml", ".yml", ".json")) else name

    def cost(self, cell: Cell) -> dict[str, int | str]:
        """Return what is known of a cell's cost before it runs.

        By name: the budget of a search and the epochs of a trial; epochs; or steps, passes and images to generate.
        """
        from salun_core.methods.method import get_method, resolve_config
        from salun_core.tasks import task_named

        entry, search, methods = cell.entry, self.search(cell.entry), task_named(self.suite.kind).methods
        budget: dict[str, int | str] = {}
        if search is not None:
            budget = {"passes": int(search.budget)} if search.budget.isdecimal() else {"search": search.budget}
        if cell.recipe.leaves_method_open:
            return budget
        config = resolve_config(methods, entry.method, entry.config)
        if search is not None:
            return {**budget, "epochs a trial at most": config.epochs}
        if self.suite.kind == "classification":
            return {"epochs": config.epochs}
        row: Any = get_method(methods, entry.method)
        return {
            "steps": 0 if row.edit else config.steps,
            "passes": row.cost(config),
            "images a row and model": self.size.evaluation.images_per_class,
        }
