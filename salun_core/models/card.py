"""Model cards: identity, training data and evaluation settings of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from salun_core.config import Document, load
from salun_core.data.spec import DataSpec
from salun_core.errors import UsageError

CARD = "model.json"


class Card(Document):
    """Shared fields of all model cards: everything needed to feed and trace a model.

    The numbers have bounds, because a network may be built from them before its weights are read.
    """

    format: Literal["salun.model/v1"] = "salun.model/v1"
    task: str = Field(description="what the model does; it selects the task of the library")
    architecture: str = Field(description="name of the architecture")
    classes: list[str] = Field(default=[], max_length=100_000, description="class names by id; may be empty")
    channels: int = Field(ge=1, le=64, description="of the images")
    height: int = Field(ge=1, le=4096, description="of the images, in pixels")
    width: int = Field(ge=1, le=4096, description="of the images, in pixels")
    data: DataSpec | None = Field(default=None, description="where the data lie; null: they are generated")
    dataset_digest: str = Field(description="data set that it was trained on")
    split_digest: str = Field(description="split manifest that it was trained on; empty where there are no data")
    parent: str | None = Field(default=None, description="digest of the model that it was made from")
    method: str = Field(default="train", description="how it was made")
    forget_set_digest: str | None = Field(default=None, description="set that was forgotten last")
    training: dict[str, object] = Field(default={}, description="resolved configuration of the method")


class ModelCard(Card):
    """`model.json` of a classifier."""

    task: Literal["classification"] = "classification"
    architecture: str = Field(description="name for `build_classifier`")
    classes: list[str] = Field(min_length=2, max_length=100_000, description="class names by id")
    mean: list[float] = Field(description="of pixels in [0, 1], by channel")
    std: list[float] = Field(description="of pixels in [0, 1], by channel")
    data: DataSpec = Field(description="where the data lie")


class DiffusionEvaluation(Document):
    """How images are drawn from a diffusion model, and what they are judged by."""

    judge: str | None = Field(
        default=None, description="classifier that knows the classes by name: line, line@version, folder or s3://"
    )
    images_per_class: int = Field(default=50, ge=1, le=100_000, description="or per prompt")
    steps: int = Field(default=20, ge=1, le=1000, description="of denoising")
    guidance_scale: float = Field(default=3.0, ge=1, le=100, description="1: no guidance")
    seed: int = Field(default=0, ge=0, lt=2**53, description="of the first image")
    batch_size: int = Field(default=64, ge=1, description="images that are drawn together")
    extractor: str = Field(
        default="judge", description="features for FID and KID: judge, none, or an Inception .safetensors"
    )
    clip: str | None = Field(default=None, description="folder of a CLIP model for the CLIP score")
    suite: Literal["class", "concept", "nsfw"] = Field(default="class", description="what is looked for")
    prompts: list[str] = Field(default=[], description="further prompts of the concept and nsfw suites")
    neighbours: list[str] = Field(default=[], description="prompts near the concept that must stay")
    real_images: int = Field(default=1000, ge=2, description="that FID and KID compare with")
    relearn_steps: int = Field(default=0, ge=0, description="of benign fine-tuning before it is looked for again")
    attack_steps: int = Field(default=0, ge=0, description="of the search for a prompt that brings it back")


class DiffusionCard(Card):
    """`model.json` of a diffusers folder."""

    task: Literal["class-conditional", "text-to-image"]
    architecture: str = Field(description="class of the denoiser, in diffusers")
    prompt: str = Field(
        default="an image of a {label}", description="text-to-image: what an image of a class is called"
    )
    evaluation: DiffusionEvaluation = Field(default=DiffusionEvaluation(), description="how it is judged")
    trainable_text_encoder: bool = Field(
        default=False, description="text-to-image: whether a method may train the text encoder"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task == "text-to-image" and "{label}" not in self.prompt:
            raise ValueError("prompt must hold {label}, where the name of the class goes")
        if self.task == "class-conditional" and not self.classes:
            raise ValueError("a class-conditional model needs classes")
        if self.task == "class-conditional" and self.trainable_text_encoder:
            raise ValueError("a class-conditional model has no text encoder to train")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class name occurs twice")
        return self

    def prompt_of(self, label: str) -> str:
        """Return the condition name of a class: its prompt, or the class name for a class-conditional model."""
        return self.prompt.replace("{label}", label) if self.task == "text-to-image" else label


CardT = TypeVar("CardT", bound=Card)


def load_card(kind: type[CardT], folder: Path) -> CardT:
    """Read the card of a model folder; raises UsageError if it is missing, faulty or of another kind of model."""
    require_card(folder)
    return load(kind, folder / CARD)


def require_card(folder: Path) -> None:
    """Raise UsageError if a folder has no model card."""
    if not (folder / CARD).is_file():
        raise UsageError(f"{folder} is not a model folder", f"it has no {CARD}", "make one with `salun model import`")
