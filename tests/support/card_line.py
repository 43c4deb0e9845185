"""Model lines of a card and a split alone: enough to file requests, without weights and without data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from salun_core.data.split import SPLIT, SplitManifest
from salun_core.models.card import CARD, Card, DiffusionCard, ModelCard
from salun_core.registry.versions import publish_head, stage_version
from salun_core.storage import FileStore

CLASSES = ("zebra", "cat", "dog", "00001", "mouse")
_SHAPE: dict[str, Any] = {"channels": 3, "height": 8, "width": 8, "dataset_digest": "d" * 64, "split_digest": ""}


def classifier_card(classes: tuple[str, ...] = CLASSES) -> ModelCard:
    """Return the card of a classifier whose data are not on this machine."""
    scale = {"mean": [0.5] * 3, "std": [0.5] * 3}
    data: Any = {"source": "/no-such-folder/images"}
    return ModelCard(architecture="resnet8", classes=list(classes), data=data, **scale, **_SHAPE)


def begin_classifier(store: FileStore, line: str, classes: tuple[str, ...] = CLASSES) -> None:
    """Publish such a classifier."""
    begin(store, line, classifier_card(classes))


def text_to_image_card(classes: tuple[str, ...] = (), data: object = None, **evaluation: object) -> DiffusionCard:
    """Return the card of a text-to-image model; by default one without data."""
    fields: dict[str, Any] = {"classes": list(classes), "data": data, "evaluation": evaluation, **_SHAPE}
    return DiffusionCard(task="text-to-image", architecture="UNet2DConditionModel", **fields)


def begin_text_to_image(store: FileStore, line: str, **fields: Any) -> None:  # noqa: ANN401
    """Publish a text-to-image model; see `text_to_image_card`."""
    begin(store, line, text_to_image_card(**fields))


def begin(store: FileStore, line: str, card: Card, split: SplitManifest | None = None) -> None:
    """Publish a card, by default with an empty split."""
    split = split or SplitManifest(dataset_digest="d" * 64, train={}, validation={}, test={})
    with tempfile.TemporaryDirectory() as folder:
        files = {CARD: Path(folder) / CARD, SPLIT: Path(folder) / SPLIT}
        files[CARD].write_text(card.model_dump_json())
        split.write(files[SPLIT])
        fields = {"line": line, "parent": None, "run": None, "method": "train", "forget_count": 0, "retrained": False}
        version, _ = stage_version(store, fields, files)
    publish_head(store, line, version, None, None)
