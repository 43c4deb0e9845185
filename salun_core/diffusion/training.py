"""Trains the networks of small diffusion models from fresh weights, on the same loop that unlearns."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised, endless, noised
from salun_core.diffusion.latents import pixels_of
from salun_core.diffusion.objectives import denoising_loss
from salun_core.diffusion.recipes import DenoiserRecipe, StableDiffusionRecipe
from salun_core.digest import digest_json, sha256_bytes
from salun_core.unlearn.checkpoint import CheckpointStore
from salun_core.unlearn.config import LoopConfig, pick_device
from salun_core.unlearn.distributed import World
from salun_core.unlearn.loop import OnEpoch, run_loop
from salun_core.unlearn.method import Step

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


@dataclass(frozen=True)
class DenoisingStretch:
    """So many steps of plain denoising; a share of the examples is told nothing.

    Args:
        denoiser: the process, and how the network is called.
        examples: all of them, on the device.
        table: of their conditions, with a null row if any are dropped.
        drop: share of examples told nothing.
        count: of steps.
        size: of a batch.
    """

    denoiser: Denoiser
    examples: Examples
    table: ConditionTable
    drop: float
    count: int
    size: int

    name = "denoising"

    @property
    def device(self) -> torch.device:
        """Where the examples are."""
        return self.examples.mean.device

    def __len__(self) -> int:
        return self.count * self.size

    def steps(self, batch_size: int) -> int:
        """Return the number of steps."""
        return self.count

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield the steps; the average of the weights follows each."""
        trained: list[Averaged] = []
        order = endless(len(self.examples), config.batch_size, generator)
        for _ in range(self.count):
            chosen = self.examples.select(next(order))
            if self.drop and self.table.null is not None:
                dropped = (torch.rand(len(chosen), generator=generator) < self.drop).to(self.device)
                chosen = Examples(chosen.mean, chosen.condition.masked_fill(dropped, self.table.null), chosen.std)
            batch = noised(chosen, self.denoiser.process, generator)
            yield Step(partial(self._loss, batch, trained), len(batch), 1.0)
            trained.pop().follow()

    def _loss(self, batch: Noised, trained: list[Averaged], model: nn.Module) -> Tensor:
        assert isinstance(model, Averaged)
        trained.append(model)
        return denoising_loss(self.denoiser.of(model.network), batch, self.table)


@dataclass(frozen=True)
class ReconstructionStretch:
    """So many steps of an autoencoder: squared error, and the latent's divergence from a unit normal.

    Args:
        images: uint8 [N, C, H, W].
        divergence: weight of the divergence, summed over the latent, a pixel.
        count: of steps.
        size: of a batch.
    """

    images: Tensor
    divergence: float
    count: int
    size: int

    name = "reconstruction"

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def __len__(self) -> int:
        return self.count * self.size

    def steps(self, batch_size: int) -> int:
        """Return the number of steps."""
        return self.count

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield the steps."""
        order = endless(len(self.images), config.batch_size, generator)
        for _ in range(self.count):
            pixels = pixels_of(self.images[next(order).to(self.device)])
            noise = torch.Generator().manual_seed(int(torch.randint(2**53, (), generator=generator)))
            yield Step(partial(self._loss, pixels, noise), len(pixels), 1.0)

    def _loss(self, pixels: Tensor, noise: torch.Generator, model: Any) -> Tensor:  # noqa: ANN401 - diffusers' own
        latent = model.encode(pixels).latent_dist
        drawn = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=noise).to(pixels.device)
        error = mse_loss(model.decode(drawn).sample, pixels)
        return error + self.divergence * latent.kl().sum() / pixels.numel()  # type: ignore[no-any-return]


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
    stretch = DenoisingStretch(
        denoiser, examples.to(device), table.to(device), recipe.drop, recipe.steps // recipe.epochs, recipe.batch_size
    )
    parts = [recipe.model_dump(exclude={"device"}), type(denoiser.network).__name__, list(table.names)]
    parts += [sha256_bytes(item.cpu().numpy().tobytes()) for item in (examples.mean, examples.condition)]
    run_loop(model, lambda _: [stretch], recipe, None, checkpoint, f"train {digest_json(parts)}", on_epoch)
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
    stretch = ReconstructionStretch(
        images.to(device), recipe.divergence, max(1, recipe.autoencoder_steps // epochs), recipe.batch_size
    )
    digest = digest_json([config.model_dump(exclude={"device"}), sha256_bytes(images.cpu().numpy().tobytes())])
    run_loop(autoencoder, lambda _: [stretch], config, None, checkpoint, f"autoencoder {digest}", on_epoch)
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
