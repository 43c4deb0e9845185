"""Creates the first version of a model line, by training or by importing a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun_core.config import parse
from salun_core.data import DataSpec, ImageSource, LoadedData, load_data
from salun_core.data.images import Normalisation
from salun_core.errors import ModelError, SalunError, UsageError
from salun_core.evaluation.outputs import correct_of
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.classification.training import train_classifier
from salun_core.methods.loop import OnEpoch
from salun_core.models import ModelCard, build_classifier, save_model
from salun_core.models.checkpoint import load_weights, model_digest
from salun_core.models.importing import Checkpoint, Facts, read_checkpoint
from salun_core.models.layouts import Recognised, recognise, size_of

_CLEAR = 0.05  # by which a model that was imported rightly is better than a guess
RECIPE = {"epochs": 30, "learning_rate": 0.1, "schedule": "cosine", "batch_size": 64, "batch_norm": "update"}


@dataclass(frozen=True)
class Made:
    """A new model folder: digest of the weights, accuracies as ratios, and what an import recognised."""

    digest: str
    train_accuracy: float
    test_accuracy: float
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def near_chance(self) -> bool:
        """Whether an imported model is hardly better than a guess on the test split."""
        classes = self.facts.get("classes")
        return isinstance(classes, int) and classes > 1 and self.test_accuracy < 1 / classes + _CLEAR


def training_config(overrides: Mapping[str, Any] | None = None) -> UnlearnConfig:
    """Resolve the configuration of a training: the recipe above, then the user's overrides.

    UsageError lists all faults.
    """
    config = parse(UnlearnConfig, {**RECIPE, **(overrides or {})}, "configuration of the training")
    if config.batch_norm == "freeze":
        raise UsageError(
            "a training cannot freeze batch norm", "fresh weights have no statistics yet", "set batch_norm: update"
        )
    return config


def train_model(
    spec: DataSpec,
    architecture: str,
    config: UnlearnConfig,
    out: Path,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
) -> Made:
    """Split a data set, train a classifier on the training split, and write the model folder.

    `config` needs `batch_norm: update`.
    """
    data = load_data(spec)
    train = data.images("train")
    model, _ = train_classifier(architecture, train, len(data.table.classes), config, checkpoint, on_epoch)
    return _save(out, model.cpu(), data, train, architecture, "train", config.model_dump())


def import_model(
    path: Path,
    spec: DataSpec,
    architecture: str | None,
    out: Path | None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    classes: Sequence[str] = (),
    key: str | None = None,
) -> Made:
    """Convert a foreign classifier, a checkpoint or a folder with one, to a model folder; `out=None` writes nothing.

    Set `validation_fraction: 0` in the spec if no validation data were held out. By default the architecture is
    inferred from the tensors, and mean and std (by channel) and the class names (in the order of the outputs) come from
    the checkpoint's documents; without documents, the normalisation is measured on the training split. `key` is the
    wrapper to open, if a file has several. Check the accuracies: they reveal a wrong normalisation or split.
    """
    checkpoint = read_checkpoint(path, key)
    spec = spec if spec.size else spec.model_copy(update={"size": size_of(checkpoint)})
    data = load_data(spec)
    shape = data.images("train").shape
    found = recognise(checkpoint, architecture, *shape[:2])
    facts = describe(checkpoint, found)
    data, order = _ordered(data, list(classes) or list(found.facts.classes), bool(classes), found.facts.origin)
    train = data.images("train")
    scale, origin = _normalisation(train, mean, std, found.facts)
    train = train.normalised_by(scale)
    _check_count(checkpoint.name, found.num_classes, data.table.classes)
    model = build_classifier(found.architecture, len(data.table.classes), *shape[:2])
    load_weights(model, found.state)
    _check_outputs(model, train, len(data.table.classes), found.architecture)
    made = _save(out, model, data, train, found.architecture, "import", {})
    normalisation = f"mean {_shown(scale.mean)}, std {_shown(scale.std)}, {origin}"
    facts["classes"] = len(data.table.classes)
    return replace(made, facts={**facts, "normalisation": normalisation, **order})


def describe(checkpoint: Checkpoint, found: Recognised) -> dict[str, object]:
    """Return what was recognised in a checkpoint, for people."""
    facts: dict[str, object] = {
        "layout": found.layout,
        "architecture": found.architecture,
        "classes": found.num_classes or None,
        "parameters": found.parameters,
    }
    optional = {
        "wrapper": checkpoint.wrapper,
        "prefix": checkpoint.prefix,
        "batch_counters_added": found.added,
        "half_precision_widened": found.widened,
    }
    return facts | {name: value for name, value in optional.items() if value}


def _shown(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _check_count(name: str, outputs: int, classes: Sequence[str]) -> None:
    if outputs and outputs != len(classes):
        raise ModelError(
            f"{name} does not fit the data",
            f"it has {outputs} outputs, the data have {len(classes)} classes",
            "give the data that it was trained on, with --data",
        )


def _check_outputs(model: nn.Module, train: ImageSource, num_classes: int, architecture: str) -> None:
    """Run a model on two images, so that one that cannot run here fails before anything is written."""
    assert train.normalisation is not None
    try:
        with torch.no_grad():
            outputs = model.eval()(train.normalisation.apply(train.pixels(range(min(2, len(train))))))
    except SalunError:
        raise
    except Exception as error:  # of a network of any kind
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        size = " x ".join(map(str, train.shape))
        raise ModelError(
            f"{architecture} cannot be run on images of {size}", why, "set `size` and `channels` in the data spec"
        ) from error
    shape = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if shape != [min(2, len(train)), num_classes]:
        raise ModelError(
            f"{architecture} returns no logits for the {num_classes} classes of the data",
            f"for two images it returns {shape}",
            f"return a tensor [images, {num_classes}]",
        )


def _ordered(data: LoadedData, names: list[str], given: bool, origin: str) -> tuple[LoadedData, dict[str, object]]:
    """Number the classes of the data as the model does, and return a remark if that order is uncertain.

    `names` has the order of the outputs, and is empty if they are not known. `origin` is the document that they come
    from unless the user gave them. ModelError if the data cannot be numbered in this order.
    """
    current = list(data.table.classes)
    if not names or names == current:
        return data, {}
    if sorted(names) != sorted(current):
        only = next((name for name in names if name not in current), names[-1])
        if not given:
            return data, {
                "class_names": f"of the data; those of {origin} differ (such as {only[:40]!r}): check the order"
            }
        raise ModelError(
            "the class names do not fit the data",
            f"{len(names)} names against {len(current)} classes; {only[:40]!r} is not one of the data",
            "give the names of the data's classes, in the order of the model's outputs",
        )
    # Another order would erase another class than the one that a request names, so the rows must keep their names.
    again = load_data(data.spec.model_copy(update={"classes": names}))
    before = {sample: current[label] for sample, label in zip(data.table.ids, data.table.labels, strict=True)}
    after = {
        sample: again.table.classes[label] for sample, label in zip(again.table.ids, again.table.labels, strict=True)
    }
    if before != after or list(again.table.classes) != names:
        raise ModelError(
            "the classes of the data have another order than the model's",
            f"output 0 is {names[0]!r}, class 0 of the data {current[0]!r}, and the data have numbers of their own",
            "use data with class names, such as a folder of class folders",
        )
    return again, {"class_names": f"in the order of {'--classes' if given else origin}"}


def _normalisation(
    train: ImageSource, mean: list[float] | None, std: list[float] | None, facts: Facts
) -> tuple[Normalisation, str]:
    """Return the normalisation and where it comes from."""
    channels, origin = train.shape[0], "as given"
    if mean is None and std is None and facts.mean and facts.std:
        mean, std, origin = list(facts.mean), list(facts.std), f"from {facts.origin}"
    if mean is None and std is None:
        return train.measured(), "measured on the training split; give --mean and --std if it had others"
    if mean is None or std is None or len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ModelError(
            "normalisation does not fit the images",
            f"they have {channels} channels",
            f"give {channels} means and {channels} deviations above 0",
        )
    return Normalisation(tuple(mean), tuple(std)), origin


def _save(
    out: Path | None,
    model: nn.Module,
    data: LoadedData,
    train: ImageSource,
    architecture: str,
    method: str,
    training: dict[str, object],
) -> Made:
    scale = train.normalisation
    assert scale is not None
    channels, height, width = train.shape
    card = ModelCard(
        architecture=architecture,
        classes=list(data.table.classes),
        channels=channels,
        height=height,
        width=width,
        mean=list(scale.mean),
        std=list(scale.std),
        data=data.spec,
        dataset_digest=data.split.dataset_digest,
        split_digest=data.split.digest,
        method=method,
        training=training,
    )
    digest = save_model(out, model, card, data.split) if out else model_digest(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sets = (train, data.images("test", scale))
    on_train, on_test = (float(correct_of(model.eval(), images).mean()) for images in sets)
    return Made(digest, on_train, on_test)
