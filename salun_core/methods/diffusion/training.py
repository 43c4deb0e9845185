"""Small diffusion models trained from scratch: recipes and training loops."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised, endless, noised
from salun_core.diffusion.latents import pixels_of
from salun_core.digest import digest_json, sha256_bytes
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import LoopConfig, pick_device
from salun_core.methods.diffusion.objectives import denoising_loss
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import OnEpoch, Phase, Step, run_loop

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextModel, CLIPTokenizer


_GROUPS = 8
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"


class DenoiserRecipe(LoopConfig):
    """How a denoiser is built and trained, whatever it is told."""

    steps: int = Field(default=960, ge=1, description="steps in all, spread over the epochs")
    epochs: int = Field(default=8, ge=1, description="stretches of the run; the state is kept after each")
    learning_rate: float = Field(default=2e-3, gt=0, le=1e6, description="of the first step")
    schedule: Literal["constant", "cosine", "step"] = Field(default="cosine", description="of the learning rate")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adamw", description="torch's own")
    weight_decay: float = Field(default=1e-4, ge=0, allow_inf_nan=False, description="of the optimizer")
    gradient_clip: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient")
    channels: list[int] = Field(default=[32, 64], min_length=1, max_length=6, description="of the U-Net, by level")
    layers: int = Field(default=1, ge=1, le=8, description="residual blocks a level")
    head_channels: int = Field(default=8, ge=1, description="of one attention head")
    drop: float = Field(
        default=0.1, ge=0, lt=1, description="share of examples told nothing, for classifier-free guidance"
    )
    average: float = Field(
        default=0.0, ge=0, lt=1, description="decay a step of the average of the weights that is kept; 0: the last"
    )
    noise: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="linear", description="diffusers' schedule of the noise over 1,000 times"
    )
    prediction: Literal["epsilon", "v_prediction"] = Field(default="epsilon", description="what the network predicts")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps % self.epochs:
            raise ValueError(f"{self.steps} steps cannot be spread over {self.epochs} epochs: set epochs to a divisor")
        if any(width < 1 or width % _GROUPS or width % self.head_channels for width in self.channels):
            raise ValueError(f"each of channels must be a multiple of {_GROUPS} and of head_channels")
        return self


class DdpmRecipe(DenoiserRecipe):
    """A class-conditional DDPM in pixels (Ho et al., "DDPM", NeurIPS 2020), with a class for nothing at all."""

    attention: list[int] = Field(default=[1], description="levels of the U-Net that attend, from 0")


class StableDiffusionRecipe(DenoiserRecipe):
    """A latent diffusion model told by text (Rombach et al., "Latent diffusion models", CVPR 2022)."""

    noise: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="scaled_linear", description="diffusers' schedule of the noise over 1,000 times"
    )
    prompt: str = Field(default="an image of a {label}", description="what an image of a class is called")
    autoencoder_channels: list[int] = Field(
        default=[16, 32, 32], min_length=2, max_length=5, description="by level; each but the first halves the side"
    )
    autoencoder_steps: int = Field(default=360, ge=1, description="steps of the autoencoder's training")
    autoencoder_rate: float = Field(default=2e-3, gt=0, le=1e6, description="learning rate of its first step")
    latent_channels: int = Field(default=4, ge=1, le=64, description="of the latent")
    divergence: float = Field(
        default=1e-6, ge=0, allow_inf_nan=False, description="weight of the latent's KL divergence, summed, a pixel"
    )
    text_width: int = Field(default=64, ge=8, le=2048, multiple_of=8, description="of a token's embedding")
    text_layers: int = Field(default=2, ge=1, le=48, description="of the text encoder")
    text_steps: int = Field(
        default=100, ge=0, description="steps in which the text encoder learns to tell prompts apart"
    )
    text_length: int = Field(default=16, ge=4, le=512, description="tokens of a prompt, its two ends included")

    @model_validator(mode="after")
    def _names_the_label(self) -> Self:
        if "{label}" not in self.prompt:
            raise ValueError("prompt must hold {label}, where the name of the class goes")
        if any(width < 1 or width % _GROUPS for width in self.autoencoder_channels):
            raise ValueError(f"each of autoencoder_channels must be a multiple of {_GROUPS}")
        return self

    @property
    def shrinks(self) -> int:
        """Pixels by latent pixel, along one side."""
        return int(2 ** (len(self.autoencoder_channels) - 1))


def build_ddpm(recipe: DdpmRecipe, classes: int, size: int, channels: int) -> UNet2DModel:
    """Build the U-Net of a DDPM, with fresh weights from torch's global random state.

    Args:
        recipe: its widths.
        classes: K; the class embedding has one more row, for the null condition.
        size: side of the images, in pixels.
        channels: of the images.
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
    """Build the U-Net of a Stable Diffusion for latents of a side of `size`, with fresh weights."""
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
    """Build the autoencoder of images of a side of `size` pixels, with fresh weights."""
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
    """Build a text encoder with fresh weights.

    Args:
        recipe: its widths.
        vocabulary: number of tokens.
        ends: ids of the tokens that begin and end a prompt.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_width // 8,
        max_position_embeddings=recipe.text_length,
        bos_token_id=ends[0],
        eos_token_id=ends[1],
        pad_token_id=ends[1],
    )
    return CLIPTextModel(config)


def build_scheduler(recipe: DenoiserRecipe) -> DDIMScheduler:
    """Make the scheduler of a recipe's process, 1,000 times; it samples by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=1000,
        beta_schedule=recipe.noise,
        beta_start=0.00085 if recipe.noise == "scaled_linear" else 1e-4,
        beta_end=0.012 if recipe.noise == "scaled_linear" else 0.02,
        prediction_type=recipe.prediction,
        clip_sample=isinstance(recipe, DdpmRecipe),
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer(prompts: Sequence[str], length: int) -> CLIPTokenizer:
    """Build a tokenizer of CLIP's kind whose vocabulary is the words of some prompts and every single byte.

    Args:
        prompts: their words become one token each; others are spelt out.
        length: tokens of a prompt, its two ends included.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    pattern: Any = CLIPTokenizer().backend_tokenizer
    learnt = Tokenizer(models.BPE(unk_token=_ENDS[1], end_of_word_suffix=_WORD_END))
    learnt.normalizer, learnt.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=49408,
        show_progress=False,
        special_tokens=[*_ENDS, *(f"{letter}{_WORD_END}" for letter in sorted(letters))],
        initial_alphabet=letters,
        end_of_word_suffix=_WORD_END,
    )
    learnt.train_from_iterator(sorted(set(prompts)), trainer)
    state = json.loads(learnt.to_str())["model"]
    merges: Any = [tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(state["vocab"], merges, model_max_length=length)


_TEXT_RATE, _TEMPERATURE = 1e-3, 0.1


class Averaged(nn.Module):
    """A network in training beside the running average of its weights: both are of the state that is kept.

    Args:
        network: what is trained; the average begins as its copy.
        decay: a step; 0 means that the average is the network itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network, self.decay = network, decay
        self.average = copy.deepcopy(network).requires_grad_(False) if decay else None
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the weights; early steps weigh more, so that the beginning is soon forgotten."""
        if self.average is None:
            return
        self.taken += 1
        steps = int(self.taken)
        pull = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for mean, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(weight, pull)

    def result(self) -> nn.Module:
        """Return the network that is kept, in eval mode."""
        kept = self.network if self.average is None else self.average
        return kept.requires_grad_(True).eval()


def denoising_phase(
    denoiser: Denoiser, model: Averaged, examples: Examples, table: ConditionTable, recipe: DenoiserRecipe
) -> Phase:
    """Return one epoch of plain denoising; a share of the examples gets the null condition.

    Args:
        denoiser: the process, and how the network is called.
        model: in training.
        examples: all of them, on the device.
        table: of their conditions, with a null row if any are dropped.
        recipe: batch size, number of steps, share to drop.
    """
    count, device = recipe.steps // recipe.epochs, examples.mean.device

    def loss(batch: Noised, model: Any) -> Tensor:  # noqa: ANN401 - an `Averaged`
        return denoising_loss(denoiser.of(model.network), batch, table)

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        order = endless(len(examples), recipe.batch_size, generator)
        for _ in range(count):
            chosen = examples.select(next(order))
            if recipe.drop and table.null is not None:
                dropped = (torch.rand(len(chosen), generator=generator) < recipe.drop).to(device)
                chosen = Examples(chosen.mean, chosen.condition.masked_fill(dropped, table.null), chosen.std)
            batch = noised(chosen, denoiser.process, generator)
            yield Step(partial(loss, batch), len(batch), 1.0)
            model.follow()  # after the optimiser has taken the step

    return Phase("denoising", device, count * recipe.batch_size, count, draw)


def reconstruction_phase(images: Tensor, recipe: StableDiffusionRecipe, count: int) -> Phase:
    """Return steps of an autoencoder: squared error, and the latent's divergence from a unit normal.

    Args:
        images: uint8 [N, C, H, W].
        recipe: batch size, and weight of the divergence, summed over the latent, per pixel.
        count: number of steps.
    """

    def loss(pixels: Tensor, noise: torch.Generator, model: Any) -> Tensor:  # noqa: ANN401 - diffusers' own
        latent = model.encode(pixels).latent_dist
        drawn = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=noise).to(pixels.device)
        error = mse_loss(model.decode(drawn).sample, pixels)
        return error + recipe.divergence * latent.kl().sum() / pixels.numel()  # type: ignore[no-any-return]

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        order = endless(len(images), recipe.batch_size, generator)
        for _ in range(count):
            pixels = pixels_of(images[next(order).to(images.device)])
            noise = torch.Generator().manual_seed(int(torch.randint(2**53, (), generator=generator)))
            yield Step(partial(loss, pixels, noise), len(pixels), 1.0)

    return Phase("reconstruction", images.device, count * recipe.batch_size, count, draw)


def train_denoiser(
    denoiser: Denoiser,
    examples: Examples,
    table: ConditionTable,
    recipe: DenoiserRecipe,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
) -> Denoiser:
    """Train a denoiser, in place.

    Args:
        denoiser: with fresh weights.
        examples: latents or pixels, with the rows of their conditions.
        table: the conditions, with a null row.
        recipe: of the training.
        checkpoint: keeps the state after each epoch, and resumes from it.
        on_epoch: called after each epoch.

    Returns:
        The trained one, in eval mode.

    Raises:
        ModelError: the loss became NaN or infinite.
    """
    device = pick_device(recipe.device)
    model = Averaged(denoiser.network, recipe.average).to(device)
    phases = [denoising_phase(denoiser, model, examples.to(device), table.to(device), recipe)]
    parts = [recipe.model_dump(exclude={"device"}), type(denoiser.network).__name__, list(table.names)]
    parts += [sha256_bytes(item.cpu().numpy().tobytes()) for item in (examples.mean, examples.condition)]
    run_loop(model, lambda *_: phases, recipe, None, checkpoint, f"train {digest_json(parts)}", on_epoch)
    return denoiser.of(model.result())


def train_autoencoder(
    autoencoder: nn.Module,
    images: Tensor,
    recipe: StableDiffusionRecipe,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train an autoencoder, in place, and set its scaling factor so that scaled latents have unit variance.

    Args:
        autoencoder: an `AutoencoderKL` with fresh weights.
        images: uint8 [N, C, H, W].
        recipe: of the training.
        checkpoint: keeps the state after each epoch, and resumes from it.
        on_epoch: called after each epoch.
    """
    epochs = min(recipe.epochs, recipe.autoencoder_steps)
    config = recipe.model_copy(
        update={"learning_rate": recipe.autoencoder_rate, "steps": recipe.autoencoder_steps, "epochs": epochs}
    )
    device = pick_device(recipe.device)
    autoencoder.to(device)
    phases = [reconstruction_phase(images.to(device), recipe, max(1, recipe.autoencoder_steps // epochs))]
    digest = digest_json([config.model_dump(exclude={"device"}), sha256_bytes(images.cpu().numpy().tobytes())])
    run_loop(autoencoder, lambda *_: phases, config, None, checkpoint, f"autoencoder {digest}", on_epoch)
    _scale(autoencoder, images[:1024].to(device))


@torch.no_grad()
def _scale(autoencoder: Any, images: Tensor) -> None:  # noqa: ANN401
    spread = [autoencoder.encode(pixels_of(part)).latent_dist.mean for part in torch.split(images, 128)]
    autoencoder.register_to_config(scaling_factor=round(1 / float(torch.cat(spread).std()), 5))


def train_text_encoder(encoder: nn.Module, tokens: Tensor, recipe: StableDiffusionRecipe) -> None:
    """Train a text encoder, in place, to tell prompts apart: what it says of each differs at every later token.

    Fresh weights say nearly the same of prompts that share all words but one, and a denoiser learns slowly from that.
    The loss is the cross-entropy of cosine similarities between the prompts' mean embeddings, as CLIP's between texts
    and images (Radford et al., "CLIP", ICML 2021).

    Args:
        encoder: a `CLIPTextModel` with fresh weights, left in eval mode.
        tokens: int64 [K, length]: the prompts, the empty one among them.
        recipe: number of steps.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=_TEXT_RATE)
    wanted = torch.arange(len(tokens))
    for _ in range(recipe.text_steps):
        means = nn.functional.normalize(encoder(tokens)[0].mean(dim=1), dim=-1)
        loss = nn.functional.cross_entropy(means @ means.T / _TEMPERATURE, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    encoder.eval()
