"""The model card beside the weights: what the model is and what it was trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from salun_core.config import Document
from salun_core.data.spec import DataSpec


class ModelCard(Document):
    """`model.json`: everything that is needed to rebuild, feed and trace a classifier.

    Its numbers have bounds: the network is built from them before its weights are read.
    """

    format: Literal["salun.model/v1"] = "salun.model/v1"
    task: Literal["classification"] = "classification"
    architecture: str = Field(description="name for `build_classifier`")
    classes: list[str] = Field(min_length=2, max_length=100_000, description="class names by id")
    channels: int = Field(ge=1, le=64, description="of the images")
    height: int = Field(ge=1, le=4096, description="of the images, in pixels")
    width: int = Field(ge=1, le=4096, description="of the images, in pixels")
    mean: list[float] = Field(description="of pixels in [0, 1], by channel")
    std: list[float] = Field(description="of pixels in [0, 1], by channel")
    data: DataSpec = Field(description="where the data lie")
    dataset_digest: str = Field(description="data set that it was trained on")
    split_digest: str = Field(description="split manifest that it was trained on")
    parent: str | None = Field(default=None, description="digest of the weights that it was made from")
    method: str = Field(default="train", description="how it was made")
    forget_set_digest: str | None = Field(default=None, description="set that was forgotten last")
    training: dict[str, object] = Field(default={}, description="resolved configuration of the method")
