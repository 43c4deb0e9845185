"""Bench suites (`salun.suite/v1`): the schema, and the checks that a schema cannot express."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from salun_core.checkout import load_example
from salun_core.config import Document, parse, read_document
from salun_core.data import DataSpec
from salun_core.data.targets import ClassTarget, ConceptTarget, SubjectTarget
from salun_core.errors import UsageError, unknown_name
from salun_core.models.card import DiffusionEvaluation
from salun_core.tuning import parse_budget

SUITES = Path("benchmarks", "suites")
DIFFUSION_EXAMPLE = "small_diffusion"  # trains the base of a suite; loaded by name, for only a checkout has it
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
        min_length=2, description="requests in their order; a random share is of the training split that is left"
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
        raise ValueError("a search under wall clock finds other settings each time: give passes, or epochs as 10e")
    return budget.text


class Search(Document):
    """How the settings of each row are searched for: every row with the same budget."""

    budget: Annotated[str, AfterValidator(_repeatable)] = Field(
        description="passes (`200000`), or epochs over all training images (`10e`)"
    )
    policy: str = Field(
        default="none",
        description="none: the objective alone decides; else a gate policy whose rules bound it: auto, a name, a file",
    )


def _named(data: Any) -> Any:  # noqa: ANN401 - whatever the file held
    return {"source": data} if isinstance(data, str) else data


Data = Annotated[DataSpec, BeforeValidator(_named)]


class BaseModelSpec(Document):
    """The model that is to forget: how it is trained, or the folder that it lies in."""

    architecture: str | None = Field(default=None, description="of a classifier; a diffusion model has a recipe")
    training: dict[str, Any] = Field(default={}, description="what differs from the training's or recipe's defaults")
    folder: str | None = Field(default=None, description="a model folder, or a plain diffusers folder")
    prompt: str = Field(
        default="an image of a {label}", description="text-to-image: what an image of a class is called"
    )
    per_seed: bool = Field(default=True, description="train one for each seed; false: one for all, of seed 0")


class JudgeSpec(Document):
    """The classifier that judges generated images: how it is trained, or the folder that it lies in."""

    architecture: str = Field(default="resnet8", description="a name of `salun ls models`")
    training: dict[str, Any] = Field(default={}, description="what differs from the training's defaults")
    size: int | None = Field(default=None, ge=4, le=1024, description="side of the images that it sees; the data's")
    channels: Literal[1, 3] | None = Field(default=None, description="of the images that it sees; else the data's")
    folder: str | None = Field(default=None, description="a model folder, in place of a training")


class Entry(Document):
    """One row of the table: a method with its mask and its settings."""

    name: str = Field(min_length=1, max_length=60, description="as the table shows it")
    method: str = Field(description="a method of classifiers or of diffusion models")
    mask: Literal["saliency", "random", "none"] = Field(default="none", description="which weights may change")
    density: float | None = Field(default=None, gt=0, le=1, description="of the mask; null where it is searched for")
    config: dict[str, Any] = Field(
        default={}, description="what differs from the method's defaults; a search leaves it, `epochs` is the most"
    )
    search: bool = Field(default=True, description="false: as written, where the size searches")
    budget: Annotated[str, AfterValidator(_repeatable)] | None = Field(
        default=None, description="of this row's search, in place of the size's: such a row is no rival of the others"
    )

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return slug(self.name)


class Size(Document):
    """One size of a suite."""

    data: Data | None = Field(default=None, description="data set: a spec, or a name; paths as seen from the suite")
    model: BaseModelSpec = Field(description="the model that is to forget")
    judge: JudgeSpec | None = Field(default=None, description="of generated images")
    forget: Scenario = Field(
        description="random with a fraction; class, subject or concept as in a forget target; sequence of requests"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**53)]] = Field(min_length=1, description="of base, draw and method")
    methods: list[Entry] = Field(default=[], description="in place of the suite's methods")
    search: Search | None = Field(default=None, description="search for each row's settings; none: as written")
    retrain: dict[str, Any] | None = Field(
        default=None, description="train a reference without the forget set; what differs from the base's training"
    )
    evaluation: DiffusionEvaluation = Field(default=DiffusionEvaluation(), description="of generated images")
    threads: int | None = Field(default=None, ge=1, description="of the processor; none: as many as torch takes")
    budget_seconds: float | None = Field(default=None, gt=0, description="no cell begins that would end later")


class Suite(Document):
    """A bench suite."""

    format: Literal["salun.suite/v1"] = "salun.suite/v1"
    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60, description="as the file is called")
    title: str = Field(min_length=1, description="heading of the table")
    about: str = Field(default="", description="what the table shows, in words")
    kind: Kind = Field(description="of the model")
    rows_from: str | None = Field(
        default=None, description="a YAML file with `methods`, as seen from the suite: for rows that suites share"
    )
    methods: list[Entry] = Field(default=[], description="rows of every size that names none itself")
    sizes: dict[SizeName, Size] = Field(min_length=1, description="cpu: minutes on two cores; paper: one GPU")

    def size(self, name: str) -> Size:
        """Return a size with its rows.

        Raises:
            UsageError: the suite has none of that name.
        """
        if name not in self.sizes:
            raise unknown_name(f"size of {self.name}", name, self.sizes)
        found = self.sizes[name]
        return found if found.methods else found.model_copy(update={"methods": self.methods})


def slug(name: str) -> str:
    """Return a name as a file name: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "row"


def load_suite(path: Path) -> Suite:
    """Read a suite and check it against the methods, recipes and controls that there are.

    Raises:
        UsageError: it cannot be read, or has faults; all are listed.
    """
    faults: list[str] = []
    data = _with_rows(read_document(path), path.parent, faults)
    try:
        suite = parse(Suite, data, str(path))
    except UsageError as error:
        faults.append(error.why)
    faults += suite_faults(data, Entry)
    if faults:
        raise UsageError(f"{path} is no valid suite", "; ".join(faults), "correct them and try again")
    return suite


def _with_rows(data: Any, folder: Path, faults: list[str]) -> Any:  # noqa: ANN401 - whatever the file held
    """Put shared rows into a suite, so that whatever is said of rows holds for them too."""
    if not isinstance(data, dict) or not isinstance(data.get("rows_from"), str):
        return data
    if data.get("methods"):
        faults.append("rows_from: the suite has `methods` of its own")
        return data
    try:
        shared = read_document(folder / data["rows_from"])
    except UsageError as error:
        faults.append(f"rows_from: {error}")
        return data
    return {**data, "methods": shared.get("methods") if isinstance(shared, dict) else shared}


def find_suite(text: str, folders: Sequence[Path] = (SUITES,)) -> Path:
    """Return the file of a suite: a path, or a name that is looked up in `benchmarks/suites`.

    Raises:
        UsageError: there is none (with the nearest match).
    """
    if text.endswith((".yaml", ".yml", ".json")):
        return Path(text)
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if text not in known:
        raise unknown_name("suite", text, known or ["a YAML file"])
    return known[text]


Plain = Mapping[str, Any]
_FORGETS = {
    "classification": ("random", "class", "subject", "sequence"),
    "class-conditional": ("class",),
    "text-to-image": ("class", "concept"),
}


def suite_faults(data: Any, entry: type[Entry]) -> list[str]:  # noqa: ANN401 - whatever the file held
    """List the faults of a suite that its schema does not find.

    Args:
        data: what YAML gave; parts that the schema refuses are passed over.
        entry: the document of a row.
    """
    if not isinstance(data, dict) or data.get("kind") not in _FORGETS:
        return []
    kind, shared = data["kind"], data.get("methods")
    given = data.get("sizes")
    sizes = {name: size for name, size in given.items() if isinstance(size, dict)} if isinstance(given, dict) else {}
    ways = sorted({_searches(kind, size) for size in sizes.values() if not size.get("methods")}) or [False]
    found = [fault for way in ways if shared for fault in _of_methods(kind, shared, "methods", entry, way)]
    for name, size in sizes.items():
        own = size.get("methods")
        if own or not shared:
            found += _of_methods(kind, own, f"sizes.{name}.methods", entry, _searches(kind, size))
        found += _of_size(kind, size, f"sizes.{name}")
    return list(dict.fromkeys(found))


def _searches(kind: str, size: Plain) -> bool:
    return kind == "classification" and size.get("search") is not None


def _of_methods(kind: str, rows: Any, where: str, entry: type[Entry], searched: bool) -> Iterator[str]:  # noqa: ANN401
    if not isinstance(rows, list) or not rows:
        yield f"{where}: there are none"
        return
    entries: list[Entry] = []
    for number, row in enumerate(rows):
        try:
            one = entry.model_validate(row)
        except ValidationError:
            continue  # the schema says why
        entries.append(one)
        yield from (f"{where}.{number}: {fault}" for fault in _of_entry(kind, one, searched and one.search))
    slugs = [item.slug for item in entries]
    yield from (f"{where}: {name!r} occurs twice" for name in sorted({name for name in slugs if slugs.count(name) > 1}))
    if len(entries) == len(rows):
        yield from (f"{where}: {fault}" for fault in _missing_controls(entries, searched))


def _of_entry(kind: str, row: Entry, searched: bool) -> Iterator[str]:
    try:
        needs_mask = _needs_mask(kind, row.method)
    except UsageError as error:
        yield str(error)
        return
    if row.method == "retrain":
        yield "retrain is the reference, no row: ask for it by `retrain: {}` of the size"
    if needs_mask and row.mask == "none":
        yield f"{row.method} needs a mask: saliency, or random for the control"
    if not needs_mask and row.mask != "none":
        yield f"{row.method} takes no mask"
    if row.density is not None and row.mask == "none":
        yield "a density goes with a mask, and only a mask does"
    if row.density is None and row.mask != "none" and not searched:
        yield "a mask goes with a density: it is searched for only where the size has a `search` and the row its part"
    if row.budget is not None and not searched:
        yield "a budget goes with a search: the size has none, or the row takes no part in it"
    if "seed" in row.config:
        yield "config sets a seed: the suite's `seeds` do"
    yield from _refused(lambda: _space(row) if searched else _method_config(kind, row.method, row.config))


def _needs_mask(kind: str, method: str) -> bool:
    from salun_core.methods.method import get_method
    from salun_core.tasks import task_named

    return get_method(task_named(kind).methods, method).needs_mask


def _method_config(kind: str, method: str, config: Mapping[str, Any]) -> None:
    from salun_core.methods.method import resolve_config
    from salun_core.tasks import task_named

    resolve_config(task_named(kind).methods, method, config)


def _space(row: Entry) -> None:
    from salun_core.tuning.space import Space

    Space.of(row.method, row.config, row.density)


def _missing_controls(entries: Sequence[Entry], searched: bool) -> Iterator[str]:
    """A table must show what the saliency is worth: beside a random mask of its density, and beside none.

    Where settings are searched for, the controls get the same search; a row as written, or with a budget of its own,
    then needs none of its own.
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


def _of_size(kind: str, size: Plain, where: str) -> Iterator[str]:
    forget, model = size.get("forget"), size.get("model")
    wanted = forget.get("kind") if isinstance(forget, dict) else None
    if wanted in {"random", "class", "subject", "concept", "sequence"} and wanted not in _FORGETS[kind]:
        yield f"{where}.forget: a {kind} model forgets {' or '.join(_FORGETS[kind])}, not {wanted}"
    if isinstance(forget, dict) and wanted == "sequence":
        yield from (f"{where}.forget: {fault}" for fault in _of_sequence(forget))
    yield from (f"{where}.search: {fault}" for fault in _of_search(kind, size))
    seeds = size.get("seeds")
    if isinstance(seeds, list) and any(seeds.count(seed) > 1 for seed in seeds):
        yield f"{where}.seeds: a seed occurs twice"
    if isinstance(model, dict):
        yield from (f"{where}.model: {fault}" for fault in _of_model(kind, model, size))
    judge = size.get("judge")
    if kind == "classification" and judge is not None:
        yield f"{where}.judge: a classifier needs none"
    if isinstance(judge, dict) and isinstance(judge.get("training", {}), dict):
        yield from (f"{where}.judge: {fault}" for fault in _refused(lambda: _training(judge.get("training", {}))))


def _of_sequence(forget: Plain) -> Iterator[str]:
    steps = forget.get("steps")
    named = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    whole = [step for step in named if step.get("kind") in {"class", "subject"}]
    if any(whole.count(step) > 1 for step in whole):
        yield "a class or a subject occurs twice: nothing of it is left to forget"


def _of_search(kind: str, size: Plain) -> Iterator[str]:
    if size.get("search") is None:
        return
    if kind != "classification":
        yield "only the settings of classifiers are searched for: leave it out"
    data = size.get("data")
    if isinstance(data, dict) and data.get("validation_fraction", 1) == 0:
        yield "there are no held-out images to search on: data.validation_fraction is 0"


def _of_model(kind: str, model: Plain, size: Plain) -> Iterator[str]:
    folder, architecture = model.get("folder"), model.get("architecture")
    if folder is None and size.get("data") is None:
        yield "it is trained here, and the size names no data"
    if folder is None and kind == "classification" and not architecture:
        yield "a classifier needs an architecture, or a folder"
    if kind != "classification" and architecture:
        yield "a diffusion model has a recipe: settings under `training`, no architecture"
    settings = model.get("training", {})
    if folder is not None and settings:
        yield "a model in a folder is not trained: leave `training` out"
    elif folder is None and isinstance(settings, dict):
        if "seed" in settings:
            yield "training sets a seed: the suite's `seeds` do"
        yield from _refused(lambda: _training(settings) if kind == "classification" else _recipe(kind, settings))
    retrain = size.get("retrain")
    if kind == "classification" and isinstance(retrain, dict) and isinstance(settings, dict):
        yield from _refused(lambda: _training({**settings, **retrain}))
    elif kind != "classification" and isinstance(retrain, dict):
        yield from _refused(lambda: _method_config(kind, "retrain", retrain))


def _training(settings: Plain) -> None:
    from salun_core.tasks.classification.training import training_config

    training_config(settings)


def _recipe(kind: str, settings: Plain) -> None:
    diffusion_example(kind, settings)


def diffusion_example(kind: str, settings: Mapping[str, Any]) -> tuple[ModuleType, Any]:
    """Return the example that trains a suite's diffusion model from scratch, and the resolved recipe.

    Raises:
        UsageError: unknown settings, or no checkout.
    """
    example = load_example(DIFFUSION_EXAMPLE)
    return example, example.resolve_recipe("ddpm" if kind == "class-conditional" else "stable-diffusion", settings)


def _refused(check: Callable[[], None]) -> Iterator[str]:
    try:
        check()
    except UsageError as error:
        yield f"{error.what}: {error.why}"
