"""The tasks: one entry for each kind of model, selected by the task on the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salun_core.config import parse, read_document
from salun_core.data import ForgetSet, LoadedData, load_data, resolve_forget
from salun_core.data.forget_set import require_partial
from salun_core.data.spec import relocated_spec
from salun_core.data.split import SplitExcerpt, SplitManifest
from salun_core.data.table import Table
from salun_core.data.targets import Target
from salun_core.digest import check_digest
from salun_core.errors import reported_as, unknown_name
from salun_core.models.card import CARD, Card, require_card
from salun_core.registry.versions import publish_head, stage_version
from salun_core.storage import FileStore
from salun_core.tasks.classification import ClassificationTask
from salun_core.tasks.diffusion import DiffusionTask
from salun_core.tasks.resolve import read_forget
from salun_core.tasks.task import Inputs, Model, Task

TASKS: dict[str, Task[Any]] = {"classification": ClassificationTask(), "diffusion": DiffusionTask()}


def task_named(name: str) -> Task[Any]:
    """Return the task with the name on a model card; the UsageError of an unknown name suggests the nearest match."""
    known = {value: task for task in TASKS.values() for value in task.card_tasks}
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name]


def parse_card(data: Any, source: str = CARD) -> Card:  # noqa: ANN401 - any YAML or JSON value
    """Build the card that a document's `task` selects; a card without one is a classifier's.

    UsageError lists all faults.
    """
    name = data.get("task", "classification") if isinstance(data, Mapping) else "classification"
    return parse(task_named(str(name)).card_type, data, source)


def read_card(folder: Path) -> Card:
    """Read the card of a model folder."""
    require_card(folder)
    return parse_card(read_document(folder / CARD), str(folder / CARD))


def task_of(folder: Path) -> Task[Any]:
    """Return the task of a model folder; UsageError if it is not a model folder or its card has faults."""
    return task_named(read_card(folder).task)


def open_inputs(
    model: Path,
    forget: str,
    data: str | None = None,
    loaded: LoadedData | None = None,
    excerpt: SplitExcerpt | None = None,
) -> Inputs[Any]:
    """Load and check the inputs of a step; `forget` is the address of targets or of a resolved forget set.

    `data` replaces the location on the model card. `loaded` data are used if they are those of the model, and with an
    `excerpt` the file of the split is not read. Images are decoded on first use.
    """
    task = task_of(model)
    return inputs_of(task, task.load(model, excerpt), read_forget(forget), data, loaded)


def inputs_of(
    task: Task[Any],
    original: Model,
    forget_set: ForgetSet | list[Target],
    data: str | None = None,
    loaded: LoadedData | None = None,
) -> Inputs[Any]:
    """Combine a loaded model with its data and a forget set, and check them.

    Arguments and errors as for `open_inputs`.
    """
    split = original.split
    spec = relocated_spec(original.card.data, data) if original.card.data is not None else None
    if loaded is None or loaded.spec != spec or loaded.split.digest != split.digest:
        loaded = load_data(spec, split) if spec is not None else None
    if isinstance(forget_set, ForgetSet):
        check_digest("the split of the forget set", split.digest, forget_set.split_digest)
    else:
        forget_set = resolve_targets(task, forget_set, loaded.table if loaded else None, split)
    if isinstance(split, SplitExcerpt):  # who made it saw the whole split, and checked that something is kept
        split.require(forget_set.samples)
    else:
        require_partial(forget_set, split)
    inputs: Inputs[Any] = task.inputs(original, loaded, forget_set)
    return inputs


def resolve_targets(task: Task[Any], targets: Sequence[Target], table: Table | None, split: SplitManifest) -> ForgetSet:
    """Check that a model of this task can forget the targets, and resolve them; see `resolve_forget`."""
    with reported_as("the model line cannot forget what the forget set names"):
        task.check_targets(targets)
        return resolve_forget(targets, table, split)


def register_model(store: FileStore, line: str, folder: Path, method: str, trained_on: int) -> str:
    """Publish a model folder as the first version of a line, and return its digest.

    ConflictError if the line has a HEAD.

    `method` is train or import; `trained_on` counts training samples, 0 if unknown.
    """
    fields = {"line": line, "parent": None, "method": method, "lineage": {"trained_on": trained_on}}
    files = task_of(folder).version_files(folder)
    version, _ = stage_version(store, fields, files)
    publish_head(store, line, version, None, None, files)
    return version
