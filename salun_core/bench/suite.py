"""A bench suite: what is measured, written down as YAML, `salun.suite/v1`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from salun_core.bench.faults import suite_faults
from salun_core.config import Document, parse, read_document
from salun_core.data import DataSpec
from salun_core.data.targets import ClassTarget, ConceptTarget, SubjectTarget
from salun_core.errors import UsageError, unknown_name
from salun_core.models.generation_card import GenerationEvaluation
from salun_core.unlearn.tuning import parse_budget

SUITES = Path("benchmarks", "suites")
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
    evaluation: GenerationEvaluation = Field(default=GenerationEvaluation(), description="of generated images")
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
