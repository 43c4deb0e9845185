"""Bench suites (`salun.suite/v1`): the schema, reading a file, and the checks that a schema cannot express."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from lab.checkout import load_example
from salun_core.config import Document, parse, read_document
from salun_core.data import DataSpec
from salun_core.data.targets import ClassTarget, ConceptTarget, SubjectTarget
from salun_core.errors import UsageError, unknown_name
from salun_core.methods.method import get_method, resolve_config
from salun_core.methods.recipe import Recipe
from salun_core.models.card import DiffusionEvaluation
from salun_core.tuning import parse_budget

SUITES = Path("lab", "suites")
DIFFUSION_EXAMPLE = "small_diffusion"  # trains the base model; loaded by name, because only a checkout has it
T = TypeVar("T")
SizeName = Literal["cpu", "paper"]
Kind = Literal["classification", "class-conditional", "text-to-image"]


class RandomTarget(Document):
    """A share of the training split, drawn by the seed."""

    kind: Literal["random"] = "random"
    fraction: float = Field(gt=0, lt=1, description="share of the training split")


Request = Annotated[RandomTarget | ClassTarget | SubjectTarget, Field(discriminator="kind")]


class SequenceTarget(Document):
    """Several requests on one line, one run after the other."""

    kind: Literal["sequence"] = "sequence"
    steps: list[Request] = Field(
        min_length=2, description="requests in their order; a random share is of the remaining training split"
    )


Scenario = Annotated[
    RandomTarget | ClassTarget | SubjectTarget | ConceptTarget | SequenceTarget, Field(discriminator="kind")
]


def _repeatable(text: str) -> str:
    try:
        budget = parse_budget(text, 1)
    except UsageError as error:
        raise ValueError(f"{error.what}: give passes such as 200000, or epochs such as 10e") from error
    if budget.passes is None:
        raise ValueError("a search limited by time is not reproducible: give passes, or epochs as 10e")
    return budget.text


class Search(Document):
    """The search for the settings of each row: every row with the same budget."""

    budget: Annotated[str, AfterValidator(_repeatable)] = Field(
        description="passes (`200000`), or epochs over all training images (`10e`)"
    )
    policy: str = Field(
        default="none",
        description="none: only the objective decides; else a gate policy that bounds it: auto, a name or a file",
    )


Data = Annotated[DataSpec, BeforeValidator(lambda data: {"source": data} if isinstance(data, str) else data)]


class BaseModelSpec(Document):
    """The model to unlearn from: how to train it, or its folder."""

    architecture: str | None = Field(default=None, description="of a classifier; a diffusion model has a recipe")
    training: dict[str, Any] = Field(
        default={}, description="settings that differ from the defaults of the training or the recipe"
    )
    folder: str | None = Field(default=None, description="a model folder, or a plain diffusers folder")
    prompt: str = Field(default="an image of a {label}", description="text-to-image: prompt of an image of a class")
    per_seed: bool = Field(default=True, description="train one for each seed; false: one for all, with seed 0")


class JudgeSpec(Document):
    """The classifier of generated images: how to train it, or its folder."""

    architecture: str = Field(default="resnet8", description="a name of `salun ls models`")
    training: dict[str, Any] = Field(default={}, description="settings that differ from the training's defaults")
    size: int | None = Field(default=None, ge=4, le=1024, description="side of its input images; default: the data's")
    channels: Literal[1, 3] | None = Field(default=None, description="of its input images; default: the data's")
    folder: str | None = Field(default=None, description="a model folder, instead of training")


class SuiteEntry(Document):
    """One row of the table: a method with its mask and its settings."""

    name: str = Field(min_length=1, max_length=60, description="as the table shows it")
    method: str = Field(
        description="a method of classifiers or of diffusion models; with a search also auto, or several with commas"
    )
    mask: Literal["saliency", "random", "none"] = Field(default="none", description="which weights may change")
    density: float | None = Field(default=None, gt=0, le=1, description="of the mask; null if it is searched for")
    config: dict[str, Any] = Field(
        default={},
        description="settings that differ from the method's defaults; a search keeps them, `epochs` as a maximum",
    )
    search: bool = Field(default=True, description="false: run as written even if the size has a search")
    budget: Annotated[str, AfterValidator(_repeatable)] | None = Field(
        default=None, description="of this row's search, instead of the size's; the row then needs no control"
    )

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return slug(self.name)


class Size(Document):
    """One size of a suite."""

    data: Data | None = Field(default=None, description="data set: a spec or a name; paths are relative to the suite")
    model: BaseModelSpec = Field(description="the model to unlearn from")
    judge: JudgeSpec | None = Field(default=None, description="classifier of generated images")
    forget: Scenario = Field(
        description="random with a fraction; class, subject or concept as in a forget target; or a sequence of requests"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**53)]] = Field(min_length=1, description="of base, draw and method")
    methods: list[SuiteEntry] = Field(default=[], description="instead of the suite's methods")
    search: Search | None = Field(default=None, description="search for each row's settings; null: as written")
    retrain: dict[str, Any] | None = Field(
        default=None,
        description="train a reference without the forget set; settings that differ from the base's training",
    )
    references: int = Field(
        default=3, ge=1, description="retrained models per seed, each with a seed of its own; a floor needs two"
    )
    evaluation: DiffusionEvaluation = Field(default=DiffusionEvaluation(), description="of generated images")
    threads: int | None = Field(default=None, ge=1, description="of the processor; null: torch's default")
    budget_seconds: float | None = Field(default=None, gt=0, description="no cell starts that would end later")


class Suite(Document):
    """A bench suite."""

    format: Literal["salun.suite/v1"] = "salun.suite/v1"
    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60, description="name of the file")
    title: str = Field(min_length=1, description="heading of the table")
    about: str = Field(default="", description="what the table shows")
    kind: Kind = Field(description="of the model")
    rows_from: str | None = Field(default=None, description="a YAML file with shared `methods`, relative to the suite")
    methods: list[SuiteEntry] = Field(default=[], description="rows of every size without its own")
    sizes: dict[SizeName, Size] = Field(min_length=1, description="cpu: minutes on two cores; paper: one GPU")

    def size(self, name: str) -> Size:
        """Return a size with its rows. UsageError if the suite has none of that name."""
        if name not in self.sizes:
            raise unknown_name(f"size of {self.name}", name, self.sizes)
        found = self.sizes[name]
        return found if found.methods else found.model_copy(update={"methods": self.methods})


def slug(name: str) -> str:
    """Return a name as a file name: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "row"


def find_suite(text: str, folders: Sequence[Path] = (SUITES,)) -> Path:
    """Return the file of a suite: a path, or a name that is looked up in `lab/suites`.

    UsageError suggests the nearest match.
    """
    if text.endswith((".yaml", ".yml", ".json")):
        return Path(text)
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if text not in known:
        raise unknown_name("suite", text, known or ["a YAML file"])
    return known[text]


def load_suite(path: Path) -> Suite:
    """Read a suite and check it against the methods, recipes and controls. UsageError lists all faults."""
    faults: list[str] = []
    data = _with_shared_rows(read_document(path), path.parent, faults)
    try:
        suite = parse(Suite, data, str(path))
    except UsageError as error:
        faults.append(error.why)
    faults += _suite_faults(data)
    if faults:
        raise UsageError(f"{path} is not a valid suite", "; ".join(faults), "correct them and try again")
    return suite


def _with_shared_rows(data: Any, folder: Path, faults: list[str]) -> Any:  # noqa: ANN401 - any YAML or JSON value
    """Put shared rows into a suite, so that they are checked like its own."""
    if not isinstance(data, dict) or not isinstance(data.get("rows_from"), str):
        return data
    if data.get("methods"):
        faults.append("rows_from: the suite has its own `methods`")
        return data
    try:
        shared = read_document(folder / data["rows_from"])
    except UsageError as error:
        faults.append(f"rows_from: {error}")
        return data
    return {**data, "methods": shared.get("methods") if isinstance(shared, dict) else shared}


def diffusion_example(kind: str, settings: dict[str, Any]) -> tuple[ModuleType, Any]:
    """Return the example that trains a suite's diffusion model from scratch, and the resolved recipe.

    UsageError: unknown settings, or no checkout.
    """
    example = load_example(DIFFUSION_EXAMPLE)
    return example, example.resolve_recipe("ddpm" if kind == "class-conditional" else "stable-diffusion", settings)


# The checks work on the parts of a document that its schema accepts, so that one reading lists the faults of both.

_FORGETS = {
    "classification": ("random", "class", "subject", "sequence"),
    "class-conditional": ("class",),
    "text-to-image": ("class", "concept"),
}


def _valid(kind: type[T], data: Any) -> T | None:  # noqa: ANN401 - any YAML or JSON value
    """Return a part of a document, or None if it is missing or its schema has the fault."""
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError:
        return None


def _suite_faults(data: Any) -> list[str]:  # noqa: ANN401 - any YAML or JSON value
    """List the faults of a suite that its schema does not find."""
    if not isinstance(data, dict) or data.get("kind") not in _FORGETS:
        return []
    kind, shared, given = data["kind"], data.get("methods"), data.get("sizes")
    sizes = {name: size for name, size in given.items() if isinstance(size, dict)} if isinstance(given, dict) else {}
    searches = {name: kind == "classification" and size.get("search") is not None for name, size in sizes.items()}
    # Shared rows are checked for each way in which a size uses them: with a search and without.
    ways = sorted({searches[name] for name, size in sizes.items() if not size.get("methods")}) or [False]
    found = [fault for way in ways if shared for fault in _row_faults(kind, shared, "methods", way)]
    for name, size in sizes.items():
        if size.get("methods") or not shared:
            found += _row_faults(kind, size.get("methods"), f"sizes.{name}.methods", searches[name])
        found += [f"sizes.{name}.{fault}" for fault in _size_faults(kind, size)]
    return list(dict.fromkeys(found))


def _row_faults(kind: str, rows: Any, where: str, searched: bool) -> Iterator[str]:  # noqa: ANN401
    if not isinstance(rows, list) or not rows:
        yield f"{where}: the list is empty"
        return
    entries = [_valid(SuiteEntry, row) for row in rows]
    for number, row in enumerate(entries):
        if row is not None:
            yield from (f"{where}.{number}: {fault}" for fault in _entry_faults(kind, row, searched and row.search))
    slugs = [row.slug for row in entries if row is not None]
    yield from (f"{where}: {name!r} occurs twice" for name in sorted({name for name in slugs if slugs.count(name) > 1}))
    valid = [row for row in entries if row is not None]
    if len(valid) == len(entries):
        yield from (f"{where}: {fault}" for fault in _missing_controls(valid, searched))


def _entry_faults(kind: str, row: SuiteEntry, searched: bool) -> Iterator[str]:
    from salun_core.tasks import task_named
    from salun_core.tuning.space import spaces_of

    methods, open_method = task_named(kind).methods, Recipe(method=row.method).leaves_method_open
    try:
        needs_mask = not open_method and get_method(methods, row.method).needs_mask
    except UsageError as error:
        yield str(error)
        return
    faults = {
        "retrain is the reference, not a row: request it with `retrain: {}` of the size": row.method == "retrain",
        f"{row.method} needs a mask: saliency, or random for the control": needs_mask and row.mask == "none",
        f"{row.method} takes no mask": not needs_mask and not open_method and row.mask != "none",
        "the search chooses method and mask: leave out mask and density": open_method
        and (row.mask != "none" or row.density is not None),
        f"the method {row.method} needs a search: name one": open_method and not searched,
        "a density without a mask: only a mask has one": row.density is not None and row.mask == "none",
        "a mask without a density: only a row that takes part in a search may leave it out": row.density is None
        and row.mask != "none"
        and not searched,
        "a budget without a search: the size has none, or the row takes no part in it": row.budget is not None
        and not searched,
        "config sets a seed: the suite's `seeds` do": "seed" in row.config,
    }
    yield from (fault for fault, found in faults.items() if found)
    if searched:
        yield from _raised(lambda: spaces_of(row.method, row.config, row.density))
    elif not open_method:
        yield from _raised(lambda: resolve_config(methods, row.method, row.config))


def _missing_controls(entries: Sequence[SuiteEntry], searched: bool) -> Iterator[str]:
    """A table must show the effect of the saliency: against a random mask of its density, and against no mask.

    With a search the controls get the same search; a row as written, or with its own budget, then needs no control.
    """
    equals = [row for row in entries if (row.search and row.budget is None) or not searched]
    if not any(row.mask == "saliency" for row in equals):
        equals = list(entries)
    salient = [row for row in equals if row.mask == "saliency"]
    alike = "its density, its config and its search" if searched else "its density and its config"
    for row in salient:
        wanted = (row.method, "random", row.density, row.config)
        if not any((other.method, other.mask, other.density, other.config) == wanted for other in equals):
            yield f"{row.name!r} has no control: {row.method} with mask random, {alike}"
    if salient and not any(row.method == "random_label" for row in equals):
        yield "there is no control without a mask: random_label with mask none" + (", searched" if searched else "")


def _size_faults(kind: str, size: dict[str, Any]) -> Iterator[str]:
    from salun_core.tasks import task_named
    from salun_core.tasks.classification.training import training_config

    classifier, searched = kind == "classification", size.get("search") is not None
    forget, data = _valid(Scenario, size.get("forget")), _valid(Data, size.get("data"))  # type: ignore[arg-type]
    steps: Sequence[Any] = forget.steps if isinstance(forget, SequenceTarget) else ()
    whole = [step for step in steps if not isinstance(step, RandomTarget)]
    seeds = _valid(list[Any], size.get("seeds")) or []
    wanted = forget.kind if forget is not None else ""
    faults = {
        f"forget: a {kind} model forgets {' or '.join(_FORGETS[kind])}, not {wanted}": wanted
        not in ("", *_FORGETS[kind]),
        "forget: a class or a subject occurs twice: nothing of it is left to forget": any(
            whole.count(step) > 1 for step in whole
        ),
        "search: only the settings of classifiers are searched for: leave it out": searched and not classifier,
        "search: there are no held-out images to search on: data.validation_fraction is 0": searched
        and data is not None
        and data.validation_fraction == 0,
        "seeds: a seed occurs twice": any(seeds.count(seed) > 1 for seed in seeds),
        "judge: a classifier needs none": classifier and size.get("judge") is not None,
        "references: there are none without `retrain`": size.get("references") is not None
        and size.get("retrain") is None,
    }
    yield from (fault for fault, found in faults.items() if found)
    model, retrain = _valid(BaseModelSpec, size.get("model")), _valid(dict[str, Any], size.get("retrain"))
    if model is not None:
        yield from (f"model: {fault}" for fault in _model_faults(kind, model, size.get("data") is not None))
    if retrain is not None and not classifier:
        yield from _raised(lambda: resolve_config(task_named(kind).methods, "retrain", retrain), "model: ")
    elif retrain is not None and model is not None:
        yield from _raised(lambda: training_config({**model.training, **retrain}), "model: ")
    if (judge := _valid(JudgeSpec, size.get("judge"))) is not None:
        yield from _raised(lambda: training_config(judge.training), "judge: ")


def _model_faults(kind: str, model: BaseModelSpec, has_data: bool) -> Iterator[str]:
    from salun_core.tasks.classification.training import training_config

    classifier, trained = kind == "classification", model.folder is None
    faults = {
        "it is trained here, and the size names no data": trained and not has_data,
        "a classifier needs an architecture, or a folder": classifier and trained and not model.architecture,
        "a diffusion model has a recipe: put settings under `training`, without an architecture": not classifier
        and bool(model.architecture),
        "a model in a folder is not trained: leave `training` out": not trained and bool(model.training),
        "training sets a seed: the suite's `seeds` do": trained and "seed" in model.training,
    }
    yield from (fault for fault, found in faults.items() if found)
    if trained and classifier:
        yield from _raised(lambda: training_config(model.training))
    elif trained:
        yield from _raised(lambda: diffusion_example(kind, model.training))


def _raised(check: Callable[[], object], where: str = "") -> Iterator[str]:
    """Yield the fault that a check raises."""
    try:
        check()
    except UsageError as error:
        yield f"{where}{error.what}: {error.why}"
