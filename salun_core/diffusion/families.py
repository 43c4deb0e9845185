"""A loaded diffusion model with its family-specific parts: examples, conditions, sampler, decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salun_core.data.images import ImageSet, fitted
from salun_core.diffusion.conditions import ConditionTable, TextEncoder, check_prompts, encode_prompts
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.latents import cached, decoder, latents_of, pixels_of
from salun_core.diffusion.process import Process
from salun_core.diffusion.sampling import Decode, Sampler, to_bytes
from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import ModelError, UsageError, unknown_name
from salun_core.models.card import DiffusionCard, DiffusionEvaluation
from salun_core.models.diffusers_folder import LoadedDiffusion

_BATCH = 256  # images resized at once, to bound the memory of their float copies


@dataclass(frozen=True)
class Family:
    """A loaded model, ready to train and to generate images.

    Args:
        denoiser: denoiser of the model, in float32.
        shape: shape of one sample, (C, H, W): pixels or latents.
    """

    loaded: LoadedDiffusion
    denoiser: Denoiser
    shape: tuple[int, int, int]
    decode: Decode

    @property
    def card(self) -> DiffusionCard:
        """The model's card."""
        return self.loaded.card

    @property
    def pixels(self) -> bool:
        """Whether samples are pixels instead of latents."""
        return "vae" not in self.loaded.components.parts

    def sampler(self, evaluation: DiffusionEvaluation) -> Sampler:
        """Return the sampler for these settings."""
        return Sampler.of_scheduler(
            self.loaded.components.parts["scheduler"],
            self.shape,
            latents=not self.pixels,
            steps=evaluation.steps,
            guidance_scale=evaluation.guidance_scale,
            batch_size=evaluation.batch_size,
        )

    def conditions(self, names: Sequence[str]) -> ConditionTable:
        """Return the conditions of class names, or of prompts for a text-to-image model, each in one row, null last.

        Rows are on the CPU, in the order of first occurrence. An unknown class or an empty prompt is a `UsageError`.
        """
        if self.card.task == "class-conditional":
            return class_conditions(self.loaded, names)
        unique, size = check_prompts(names), (self.card.height, self.card.width)
        key = digest_json([self.loaded.digest, unique, *size])
        rows = cached("prompts", key, lambda: dict(encode_prompts(self.loaded.components, unique, *size).rows))
        return ConditionTable([*unique, ""], rows, len(unique))

    def text_encoder(self, names: Sequence[str]) -> TextEncoder:
        """Return a copy of the text encoder, to train it, with the tokens of the rows of `conditions(names)`.

        `UsageError` if the card does not allow it, or the model has no single CLIP text encoder.
        """
        if not self.card.trainable_text_encoder:
            raise UsageError(
                "selection text is refused",
                "the model card does not allow a trained text encoder",
                "import the model with --trainable-text-encoder, or select a part of the denoiser, such as xattn",
            )
        return TextEncoder.of(self.loaded.components, [*check_prompts(names), ""])

    def examples(self, images: ImageSet, condition: Tensor) -> Examples:
        """Convert uint8 images to inputs of the denoiser: pixels from -1 to 1, or latents with standard deviations.

        Images are resized to the model's size; `condition`, int64 [N], has the row of each image's condition.
        """
        size = self.card.channels, self.card.height, self.card.width
        ready = torch.cat([fitted(part, *size) for part in torch.split(images.images, _BATCH)])
        if self.pixels:
            return Examples(pixels_of(ready), condition, ids=images.ids)
        vae = self.loaded.components.parts["vae"]

        def compute() -> dict[str, Tensor]:
            mean, std = latents_of(vae, ready)
            return {"mean": mean, "std": std}

        key = digest_json([self.loaded.digest, sha256_bytes(ready.contiguous().cpu().numpy().tobytes())])
        found = cached("latents", key, compute)
        return Examples(found["mean"], condition, found["std"], ids=images.ids)


def family_of(loaded: LoadedDiffusion, device: torch.device | str = "cpu") -> Family:
    """Prepare a loaded model, with denoiser, autoencoder and text encoders on the device.

    `ModelError` if the scheduler is not supported, or the card's size does not fit the autoencoder.
    """
    for part in loaded.components.parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(device)
    network = loaded.network if loaded.network.dtype == torch.float32 else loaded.network.to(torch.float32)
    denoiser = Denoiser(network, Process.of_scheduler(loaded.components.parts["scheduler"]))
    card = loaded.card
    if "vae" not in loaded.components.parts:
        return Family(loaded, denoiser, (card.channels, card.height, card.width), to_bytes)
    vae = loaded.components.parts["vae"]
    downscale = 2 ** (len(vae.config.block_out_channels) - 1)
    if card.height % downscale or card.width % downscale or vae.config.in_channels != card.channels:
        raise ModelError(
            "the card does not fit the autoencoder",
            f"{card.channels} x {card.height} x {card.width} against {vae.config.in_channels} channels and sides in "
            f"steps of {downscale}",
            "correct channels, height and width when you import it",
        )
    shape = (int(vae.config.latent_channels), card.height // downscale, card.width // downscale)
    return Family(loaded, denoiser, shape, decoder(vae))


def class_conditions(loaded: LoadedDiffusion, names: Sequence[str]) -> ConditionTable:
    """Return the conditions of class names: their ids, then the null class if the model has one.

    An unknown class is a `UsageError`.
    """
    classes, held = loaded.card.classes, embedded_classes(loaded)
    if held not in (len(classes), len(classes) + 1):
        raise ModelError(
            "the card does not fit the denoiser", f"{len(classes)} classes against {held} embeddings", "import it again"
        )
    unique = list(dict.fromkeys(names))
    for name in unique:
        if name not in classes:
            raise unknown_name("class", name, classes)
    ids = [classes.index(name) for name in unique]
    if held == len(classes):
        return ConditionTable(unique, {"class_labels": torch.tensor(ids, dtype=torch.int64)})
    return ConditionTable([*unique, ""], {"class_labels": torch.tensor([*ids, len(classes)])}, len(unique))


def embedded_classes(loaded: LoadedDiffusion) -> int:
    """Return the number of class embeddings of the denoiser, including the null class."""
    for name, parameter in loaded.network.named_parameters():
        if name.startswith("class_embedding.") or name.endswith("class_embedder.embedding_table.weight"):
            return len(parameter)
    raise ModelError("the denoiser has no classes", "it has no class embedding", "use a class-conditional model")
