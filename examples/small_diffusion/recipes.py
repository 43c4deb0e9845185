"""Recipes: sizes and training settings of small diffusion models, and the networks that they build."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from salun_core.methods.config import LoopConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextModel, CLIPTokenizer

_GROUPS = 8  # of the group norms, so that 8 channels are the narrowest level
_TEXT_HEAD = 8  # channels of an attention head of the text encoder
_TIMES = 1000  # T, as DDPM and Stable Diffusion have it
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"


class DenoiserRecipe(LoopConfig):
    """How a denoiser is built and trained, with any kind of condition."""

    steps: int = Field(default=960, ge=1, description="total number of steps, spread over the epochs")
    epochs: int = Field(default=8, ge=1, description="parts of the run; a checkpoint is saved after each")
    learning_rate: float = Field(default=2e-3, gt=0, le=1e6, description="learning rate of the first step")
    schedule: Literal["constant", "cosine", "step"] = Field(default="cosine", description="of the learning rate")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adamw", description="the optimizer of torch")
    weight_decay: float = Field(default=1e-4, ge=0, allow_inf_nan=False, description="weight decay of the optimizer")
    gradient_clip: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient")
    channels: list[int] = Field(default=[32, 64], min_length=1, max_length=6, description="of the U-Net, by level")
    layers: int = Field(default=1, ge=1, le=8, description="residual blocks per level")
    head_channels: int = Field(default=8, ge=1, description="channels of one attention head")
    drop: float = Field(
        default=0.1, ge=0, lt=1, description="share of examples with the null condition, for classifier-free guidance"
    )
    average: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the weights' moving average; 0 keeps the last weights instead"
    )
    noise: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="linear", description="noise schedule of diffusers over 1,000 times"
    )
    prediction: Literal["epsilon", "v_prediction"] = Field(default="epsilon", description="what the network predicts")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.steps % self.epochs:
            raise ValueError(f"{self.steps} steps cannot be spread over {self.epochs} epochs: set epochs to a divisor")
        if any(width < 1 or width % _GROUPS or width % self.head_channels for width in self.channels):
            raise ValueError(f"each of channels must be a multiple of {_GROUPS} and of head_channels")
        return self


class DdpmRecipe(DenoiserRecipe):
    """A class-conditional DDPM in pixels (Ho et al., "DDPM", NeurIPS 2020), with one more class as null condition."""

    attention: list[int] = Field(default=[1], description="levels of the U-Net with attention, from 0")


class StableDiffusionRecipe(DenoiserRecipe):
    """A text-to-image latent diffusion model (Rombach et al., "Latent diffusion models", CVPR 2022)."""

    noise: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="scaled_linear", description="noise schedule of diffusers over 1,000 times"
    )
    prompt: str = Field(default="an image of a {label}", description="prompt for an image of a class")
    autoencoder_channels: list[int] = Field(
        default=[16, 32, 32], min_length=2, max_length=5, description="by level; each but the first halves the side"
    )
    autoencoder_steps: int = Field(default=360, ge=1, description="training steps of the autoencoder")
    autoencoder_rate: float = Field(default=2e-3, gt=0, le=1e6, description="learning rate of its first step")
    latent_channels: int = Field(default=4, ge=1, le=64, description="channels of the latent")
    divergence: float = Field(
        default=1e-6, ge=0, allow_inf_nan=False, description="weight of the latent's KL divergence, summed, per pixel"
    )
    text_width: int = Field(default=64, ge=8, le=2048, multiple_of=_TEXT_HEAD, description="of a token's embedding")
    text_layers: int = Field(default=2, ge=1, le=48, description="layers of the text encoder")
    text_steps: int = Field(
        default=100, ge=0, description="steps in which the text encoder learns to distinguish the prompts"
    )
    text_length: int = Field(default=16, ge=4, le=512, description="tokens of a prompt, start and end included")

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if "{label}" not in self.prompt:
            raise ValueError("prompt must contain {label}, which the class name replaces")
        if any(width < 1 or width % _GROUPS for width in self.autoencoder_channels):
            raise ValueError(f"each of autoencoder_channels must be a multiple of {_GROUPS}")
        return self

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return int(2 ** (len(self.autoencoder_channels) - 1))


def build_ddpm(recipe: DdpmRecipe, classes: int, size: int, channels: int) -> UNet2DModel:
    """Build the U-Net of a DDPM.

    Its fresh weights, like those of all networks here, use torch's global random state. The class embedding has one
    more row than classes, for the null condition; `size` is the side in pixels.
    """
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if level in recipe.attention else "DownBlock2D" for level in range(len(recipe.channels))]
    return UNet2DModel(  # type: ignore[no-untyped-call]
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(recipe.channels),
        layers_per_block=recipe.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=recipe.head_channels,
        norm_num_groups=_GROUPS,
        num_class_embeds=classes + 1,
    )


def build_text_unet(recipe: StableDiffusionRecipe, size: int) -> UNet2DConditionModel:
    """Build the U-Net of a Stable Diffusion for latents with sides of `size`."""
    from diffusers import UNet2DConditionModel

    levels = len(recipe.channels)
    return UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=size,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=tuple(recipe.channels),
        layers_per_block=recipe.layers,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.head_channels,
        norm_num_groups=_GROUPS,
    )


def build_autoencoder(recipe: StableDiffusionRecipe, size: int, channels: int) -> AutoencoderKL:
    """Build the autoencoder of images with sides of `size` pixels."""
    from diffusers import AutoencoderKL

    levels = len(recipe.autoencoder_channels)
    return AutoencoderKL(  # type: ignore[no-untyped-call]
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(recipe.autoencoder_channels),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=recipe.latent_channels,
        norm_num_groups=_GROUPS,
        sample_size=size,
    )


def build_text_encoder(recipe: StableDiffusionRecipe, vocabulary: int, ends: tuple[int, int]) -> CLIPTextModel:
    """Build a text encoder; `ends` are the ids of the tokens that start and end a prompt."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_width // _TEXT_HEAD,
        max_position_embeddings=recipe.text_length,
        bos_token_id=ends[0],
        eos_token_id=ends[1],
        pad_token_id=ends[1],
    )
    return CLIPTextModel(config)


def build_scheduler(recipe: DenoiserRecipe) -> DDIMScheduler:
    """Build the scheduler of a recipe's process, which samples by DDIM; β is as published for each noise schedule."""
    from diffusers import DDIMScheduler

    scaled = recipe.noise == "scaled_linear"
    return DDIMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=_TIMES,
        beta_schedule=recipe.noise,
        beta_start=0.00085 if scaled else 1e-4,
        beta_end=0.012 if scaled else 0.02,
        prediction_type=recipe.prediction,
        clip_sample=isinstance(recipe, DdpmRecipe),
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer(prompts: Sequence[str], length: int) -> CLIPTokenizer:
    """Build a CLIP tokenizer whose vocabulary is the words of some prompts and every single byte.

    `length` is the number of tokens of a prompt, start and end included.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    clip: Any = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(unk_token=_ENDS[1], end_of_word_suffix=_WORD_END))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=49408,  # CLIP's: far more than the prompts need, so that every word becomes a token
        show_progress=False,
        special_tokens=[*_ENDS, *(f"{letter}{_WORD_END}" for letter in sorted(letters))],
        initial_alphabet=letters,
        end_of_word_suffix=_WORD_END,
    )
    bpe.train_from_iterator(sorted(set(prompts)), trainer)  # sorted: the same vocabulary in any order of prompts
    state = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(state["vocab"], merges, model_max_length=length)
