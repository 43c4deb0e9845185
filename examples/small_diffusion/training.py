"""Training loops of small diffusion models: autoencoder, text encoder, denoiser."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.small_diffusion.recipes import DenoiserRecipe, StableDiffusionRecipe
from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised, endless, noised
from salun_core.diffusion.latents import pixels_of
from salun_core.digest import digest_json, sha256_bytes
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import pick_device
from salun_core.methods.diffusion.objectives import denoising_loss
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import OnEpoch, Phase, Step, run_loop

_TEXT_RATE, _TEMPERATURE = 1e-3, 0.1  # of `train_text_encoder`


class Averaged(nn.Module):
    """A network in training and the moving average of its weights, which starts as a copy; a checkpoint holds both.

    `decay` is per step; 0 keeps no average.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network, self.decay = network, decay
        self.average = copy.deepcopy(network).requires_grad_(False) if decay else None
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; early steps weigh more, so that the fresh weights soon fade."""
        if self.average is None:
            return
        self.taken += 1
        steps = int(self.taken)
        pull = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for mean, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(weight, pull)

    def result(self) -> nn.Module:
        """Return the average, or the network if no average is kept, in eval mode."""
        kept = self.network if self.average is None else self.average
        return kept.requires_grad_(True).eval()


def train_denoiser(
    denoiser: Denoiser,
    examples: Examples,
    table: ConditionTable,
    recipe: DenoiserRecipe,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
) -> Denoiser:
    """Train a denoiser with fresh weights in place and return it in eval mode.

    A share of the examples gets the null row.

    It resumes from the checkpoint. ModelError if the loss became NaN or infinite.

    Source:
        Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, algorithm 1.
    """
    device, count = pick_device(recipe.device), recipe.steps // recipe.epochs
    model = Averaged(denoiser.network, recipe.average).to(device)
    parts = [recipe.model_dump(exclude={"device"}), type(denoiser.network).__name__, list(table.names)]
    parts += [sha256_bytes(item.cpu().numpy().tobytes()) for item in (examples.mean, examples.condition)]
    examples, table = examples.to(device), table.to(device)

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
            model.update()  # the loop asks for the next step after the optimizer has taken this one

    phases = [Phase("denoising", device, count * recipe.batch_size, count, draw)]
    run_loop(model, lambda *_: phases, recipe, None, checkpoint, f"train {digest_json(parts)}", on_epoch)
    return denoiser.of(model.result())


def train_autoencoder(
    autoencoder: nn.Module,
    images: Tensor,
    recipe: StableDiffusionRecipe,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train an autoencoder in place, and set its scaling factor so that scaled latents have unit variance.

    images: uint8 [N, C, H, W]. The loss is the squared error plus the divergence of the latent from a unit normal,
    summed over the latent, per pixel. The training resumes from the checkpoint.
    """
    epochs = min(recipe.epochs, recipe.autoencoder_steps)
    config = recipe.model_copy(
        update={"learning_rate": recipe.autoencoder_rate, "steps": recipe.autoencoder_steps, "epochs": epochs}
    )
    device, count = pick_device(recipe.device), max(1, recipe.autoencoder_steps // epochs)
    digest = digest_json([config.model_dump(exclude={"device"}), sha256_bytes(images.cpu().numpy().tobytes())])
    autoencoder.to(device)
    images = images.to(device)

    def loss(pixels: Tensor, noise: torch.Generator, model: Any) -> Tensor:  # noqa: ANN401 - an `AutoencoderKL`
        latent = model.encode(pixels).latent_dist
        drawn = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=noise).to(device)
        error = mse_loss(model.decode(drawn).sample, pixels)
        return error + recipe.divergence * latent.kl().sum() / pixels.numel()  # type: ignore[no-any-return]

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        order = endless(len(images), recipe.batch_size, generator)
        for _ in range(count):
            pixels = pixels_of(images[next(order).to(device)])
            noise = torch.Generator().manual_seed(int(torch.randint(2**53, (), generator=generator)))
            yield Step(partial(loss, pixels, noise), len(pixels), 1.0)

    phases = [Phase("reconstruction", device, count * recipe.batch_size, count, draw)]
    run_loop(autoencoder, lambda *_: phases, config, None, checkpoint, f"autoencoder {digest}", on_epoch)
    _set_scaling_factor(autoencoder, images[:1024])


@torch.no_grad()
def _set_scaling_factor(autoencoder: Any, images: Tensor) -> None:  # noqa: ANN401
    means = [autoencoder.encode(pixels_of(part)).latent_dist.mean for part in torch.split(images, 128)]
    autoencoder.register_to_config(scaling_factor=round(1 / float(torch.cat(means).std()), 5))


def train_text_encoder(encoder: nn.Module, tokens: Tensor, recipe: StableDiffusionRecipe) -> None:
    """Train a text encoder in place to distinguish prompts.

    With fresh weights, prompts that differ in one word have nearly the same embeddings, and a denoiser learns slowly
    from them. The loss is the cross-entropy of cosine similarities between the prompts' mean embeddings, as CLIP's is
    between texts and images (Radford et al., "CLIP", ICML 2021). tokens: int64 [K, length], with the empty prompt. The
    encoder is in eval mode afterwards.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=_TEXT_RATE)
    labels = torch.arange(len(tokens))
    for _ in range(recipe.text_steps):
        means = nn.functional.normalize(encoder(tokens)[0].mean(dim=1), dim=-1)
        loss = nn.functional.cross_entropy(means @ means.T / _TEMPERATURE, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    encoder.eval()
