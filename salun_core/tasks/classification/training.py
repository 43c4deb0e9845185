"""Creates the first version of a model line, by training or by importing a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun_core.config import parse
from salun_core.data import DataSpec, ImageSet, LoadedData, load_data
from salun_core.data.images import Normalisation
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation.outputs import outputs_of
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.classification.training import train_classifier
from salun_core.methods.loop import OnEpoch
from salun_core.models import ModelCard, build_classifier, save_model
from salun_core.models.checkpoint import load_weights
from salun_core.models.importing import read_checkpoint

RECIPE = {"epochs": 30, "learning_rate": 0.1, "schedule": "cosine", "batch_size": 64, "batch_norm": "update"}


@dataclass(frozen=True)
class Made:
    """A new model folder.

    Args:
        digest: digest of the weights.
        train_accuracy: accuracy on the training split, as a ratio.
        test_accuracy: accuracy on the test split, as a ratio.
    """

    digest: str
    train_accuracy: float
    test_accuracy: float


def training_config(overrides: Mapping[str, Any] | None = None) -> UnlearnConfig:
    """Resolve the configuration of a training: the recipe above, then the user's overrides.

    Raises:
        UsageError: an unknown key, or a value out of range (the message lists all faults).
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

    Args:
        spec: the data.
        architecture: a name for `build_classifier`.
        config: loop configuration, with `batch_norm: update`.
        out: folder to write.
        checkpoint: stores the state after each epoch.
        on_epoch: called after each epoch.

    Returns:
        Digest and accuracies.
    """
    data = load_data(spec)
    train = data.images("train")
    model, _ = train_classifier(architecture, train, len(data.table.classes), config, checkpoint, on_epoch)
    return _save(out, model.cpu(), data, train, architecture, "train", config.model_dump())


def import_model(
    path: Path,
    spec: DataSpec,
    architecture: str,
    out: Path,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Made:
    """Convert a foreign checkpoint to a model folder; names and shapes must match exactly.

    Args:
        path: `.safetensors`, `.pt`, `.pth` or `.th`.
        spec: data set of its training; set `validation_fraction: 0` if no validation data were held out.
        architecture: a name for `build_classifier`.
        out: folder to write.
        mean: mean of its training normalisation, by channel; measured on the training split by default.
        std: standard deviation of the same normalisation, by channel.

    Returns:
        Digest and accuracies. Check the accuracies: they reveal a wrong normalisation or split.

    Raises:
        ModelError: the checkpoint does not fit the architecture (the message lists the keys), or the
            normalisation does not fit the channels.
    """
    state = read_checkpoint(path)
    data = load_data(spec)
    train = data.images("train")
    scale = _normalisation(train, mean, std)
    train = ImageSet(train.images, train.labels, scale, train.augment, train.ids)
    channels, height = train.images.shape[1:3]
    model = build_classifier(architecture, len(data.table.classes), channels, height)
    load_weights(model, state)
    return _save(out, model, data, train, architecture, "import", {})


def _normalisation(train: ImageSet, mean: list[float] | None, std: list[float] | None) -> Normalisation:
    if mean is None and std is None:
        return Normalisation.of(train.images)
    channels = train.images.shape[1]
    if mean is None or std is None or len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ModelError(
            "normalisation does not fit the images",
            f"they have {channels} channels",
            f"give {channels} means and {channels} deviations above 0",
        )
    return Normalisation(tuple(mean), tuple(std))


def _save(
    out: Path,
    model: nn.Module,
    data: LoadedData,
    train: ImageSet,
    architecture: str,
    method: str,
    training: dict[str, object],
) -> Made:
    scale = train.normalisation
    assert scale is not None
    channels, height, width = train.images.shape[1:]
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
    digest = save_model(out, model, card, data.split)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    accuracies = [
        float(outputs_of(model.eval(), images).correct.mean()) for images in (train, data.images("test", scale))
    ]
    return Made(digest, *accuracies)
