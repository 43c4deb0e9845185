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
    """Return the task with the name on a model card.

    Raises:
        UsageError: no task has this name; the message suggests the nearest match.
    """
    known = {value: task for task in TASKS.values() for value in task.card_tasks}
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name]


def parse_card(data: Any, source: str = CARD) -> Card:  # noqa: ANN401 - any YAML or JSON value
    """Build the card that a document's `task` selects; the oldest cards have no task and belong to classifiers.

    Raises:
        UsageError: an unknown task, or faults (the message lists all of them).
    """
    name = data.get("task", "classification") if isinstance(data, Mapping) else "classification"
    return parse(task_named(str(name)).card_type, data, source)


def read_card(folder: Path) -> Card:
    """Read the card of a model folder.

    Raises:
        UsageError: the folder has no card, or the card has faults.
    """
    require_card(folder)
    return parse_card(read_document(folder / CARD), str(folder / CARD))


def task_of(folder: Path) -> Task[Any]:
    """Return the task of a model folder.

    Raises:
        UsageError: the folder is not a model folder, or its card has faults.
    """
    return task_named(read_card(folder).task)


def open_inputs(
    model: Path,
    forget: str,
    data: str | None = None,
    loaded: LoadedData | None = None,
    excerpt: SplitExcerpt | None = None,
) -> Inputs[Any]:
    """Load and check the inputs of a step.

    Args:
        model: folder of the original model.
        forget: address of the forget targets or of a resolved forget set.
        data: data set spec, if the data are not at the location on the model card.
        loaded: data that were read before; they are not read again if they are those of the model.
        excerpt: what the step needs of the model's split, whose file is then not read.

    Returns:
        Inputs of the model's task; images are decoded on first use.

    Raises:
        UsageError: an input does not exist or has faults, or the model cannot forget the targets.
        DataError: the forget set is empty or covers all data.
        IntegrityError: the data or the forget set belong to another split.
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
    """Combine a loaded model with its data and a forget set, and check them; errors as for `open_inputs`.

    Args:
        task: task of the model.
        original: the model.
        forget_set: forget targets, or what they were resolved to.
        data: data set spec, if the data are not at the location on the model card.
        loaded: as for `open_inputs`.
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
    """Publish a model folder as the first version of a model line.

    Args:
        store: store of the model line.
        line: name of the line; it must not have a HEAD yet.
        folder: the model folder.
        method: train or import.
        trained_on: number of training samples; 0 if unknown.

    Returns:
        Digest of the version.

    Raises:
        ConflictError: the line exists.
        UsageError: a file name is not valid in the store.
    """
    fields = {"line": line, "parent": None, "method": method, "lineage": {"trained_on": trained_on}}
    files = task_of(folder).version_files(folder)
    version, _ = stage_version(store, fields, files)
    publish_head(store, line, version, None, None, files)
    return version
