"""Configuration of the methods that unlearn a diffusion model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from salun_core.diffusion.denoiser import Selection
from salun_core.methods.config import LoopConfig
from salun_core.methods.offload import Place


class DiffusionConfig(LoopConfig):
    """What every diffusion method can set. A method with settings of its own extends it in its own file."""

    steps: int = Field(default=150, ge=1, description="steps in all, spread over the epochs")
    learning_rate: float = Field(
        default=2e-4, gt=0, le=1e6, description="of the first step; measured on small models, of Stable Diffusion 1e-5"
    )
    schedule: Literal["constant", "cosine", "step"] = Field(
        default="cosine", description="of the learning rate; a constant one leaves its noise in what is kept"
    )
    precision: Literal["float32", "bf16", "auto"] = Field(
        default="auto", description="of forward and backward passes; auto: bf16 on a GPU, float32 elsewhere"
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adam", description="torch's own")
    weight_decay: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="acts on salient weights only where there is a mask"
    )
    batch_size: int = Field(default=32, ge=1, description="forget examples a step, and as many retain examples")
    retain_limit: int | None = Field(
        default=2000, ge=1, description="images to keep that are encoded, drawn evenly; null: all that a run can visit"
    )
    gradient_clip: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient")
    alpha: float = Field(
        default=3.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the retain loss beside the forget loss, both averaged over all elements",
    )
    alpha_convention: Literal["mean", "reference"] = Field(
        default="mean",
        description="`reference`: alpha as the published DDPM code counts it, where the retain loss is a sum over "
        "pixels: it is multiplied by channels x height x width (of latents nothing changes)",
    )
    null_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the retain examples that are told nothing, so that what guidance starts from stays",
    )
    allow_zero_alpha: bool = Field(default=False, description="alpha 0 destroys every class; this forces it")
    selection: Selection = Field(
        default="full", description="the part of the denoiser that may change; `text`: the text encoder instead"
    )
    pseudo: Literal["next", "random", "anchor"] = Field(
        default="next",
        description="what a forgotten class is to look like: the next class that is kept, one drawn for each image; "
        "`anchor` is a concept's own",
    )
    saliency_passes: int = Field(default=1, ge=1, description="passes over the forget set that the scores average")
    saliency_times: Literal["uniform", "stratified"] = Field(
        default="uniform", description="how each pass draws its times"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="saves memory and costs a forward pass, in scoring and in training"
    )
    offload: Place = Field(
        default="none",
        description="where optimiser state and unused weights of the original are during the training: `cpu` is main "
        "memory, `disk` a temporary file. Saves memory of the device, with the same results",
    )

    @property
    def scoring_passes(self) -> int:
        """Number of passes over the forget set for the saliency scores."""
        return self.saliency_passes

    @property
    def state_place(self) -> Place:
        """Where the state of the optimiser is between its steps."""
        return self.offload

    @model_validator(mode="after")
    def _epochs_divide_steps(self) -> Self:
        if self.steps % self.epochs:
            raise ValueError(f"{self.steps} steps cannot be spread over {self.epochs} epochs: set epochs to a divisor")
        return self
