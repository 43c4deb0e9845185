"""Trains a small diffusion model on labelled images and writes its model folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from examples.small_diffusion import recipes
from examples.small_diffusion.recipes import DdpmRecipe, DenoiserRecipe, StableDiffusionRecipe
from examples.small_diffusion.training import train_autoencoder, train_denoiser, train_text_encoder
from salun_core.config import parse
from salun_core.data import DataSpec, ImageSet, LoadedData, load_data
from salun_core.diffusion.conditions import ConditionTable, encode_prompts
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.latents import latents_of, pixels_of
from salun_core.diffusion.process import Process
from salun_core.errors import DataError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import FileCheckpoint
from salun_core.methods.loop import OnEpoch
from salun_core.models.card import DiffusionCard, DiffusionEvaluation
from salun_core.models.diffusers_folder import Components, copies, silence_logs, write_diffusion
from salun_core.tasks.diffusion.importing import MadeDiffusion

Kind = Literal["ddpm", "stable-diffusion"]

KINDS: dict[Kind, tuple[type[DenoiserRecipe], DiffusionEvaluation]] = {
    # Pixels are clipped at every sampling step, and more guidance than 1.5 drives them to the bounds.
    "ddpm": (DdpmRecipe, DiffusionEvaluation(guidance_scale=1.5)),
    "stable-diffusion": (StableDiffusionRecipe, DiffusionEvaluation()),
}
"""By kind: its recipe, and how its images are evaluated by default."""


def resolve_recipe(kind: Kind, overrides: Mapping[str, Any] | None = None) -> DenoiserRecipe:
    """Resolve the recipe of a kind of model; UsageError lists all faults."""
    return parse(KINDS[kind][0], dict(overrides or {}), f"recipe of {kind}")


@dataclass(frozen=True)
class _Training:
    """One training: what all its parts read and write; `checkpoints` is the folder for the state after each epoch."""

    recipe: DenoiserRecipe
    data: LoadedData
    images: ImageSet
    checkpoints: Path | None
    on_epoch: OnEpoch | None
    losses: list[float]

    def build(self, network: Callable[[], Any]) -> Any:  # noqa: ANN401 - of diffusers or transformers
        """Build a network with weights from the recipe's seed alone; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return network()

    def checkpoint(self, name: str) -> FileCheckpoint | None:
        """Return the checkpoint file of a part."""
        return FileCheckpoint(self.checkpoints / f"{name}.safetensors") if self.checkpoints else None

    def record(self, epoch: EpochRecord) -> None:
        """Note the loss of an epoch, and pass the record on."""
        self.losses.append(next(iter(epoch.losses.values())))
        if self.on_epoch:
            self.on_epoch(epoch)


def train(
    spec: DataSpec,
    recipe: DenoiserRecipe,
    out: Path,
    evaluation: DiffusionEvaluation | None = None,
    checkpoints: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> MadeDiffusion:
    """Train the small diffusion model of a recipe, and write its model folder.

    It resumes from checkpoints, and saves none without their folder. DataError: the images are not square, or the U-Net
    cannot halve their size.
    """
    data = load_data(spec)
    images = data.image_set("train")
    channels, height, width = images.images.shape[1:]
    if height != width:
        raise DataError(
            "the images are not square", f"they have {height} x {width} pixels", "set `size` in the data spec"
        )
    training = _Training(recipe, data, images, checkpoints, on_epoch, [])
    if isinstance(recipe, StableDiffusionRecipe):
        pipeline, network = _stable_diffusion(training, recipe, out)
        kind: Kind = "stable-diffusion"
        fields: dict[str, Any] = {"task": "text-to-image", "prompt": recipe.prompt}
    else:
        assert isinstance(recipe, DdpmRecipe)
        pipeline, network = _ddpm(training, recipe)
        kind, fields = "ddpm", {"task": "class-conditional"}
    card = DiffusionCard(
        **fields,
        architecture=type(network).__name__,
        classes=list(data.table.classes),
        channels=channels,
        height=height,
        width=width,
        data=data.spec,
        dataset_digest=data.split.dataset_digest,
        split_digest=data.split.digest,
        training=recipe.model_dump(mode="json"),
        evaluation=evaluation or KINDS[kind][1],
    )
    digest = _write(out, pipeline, card, data)
    count = sum(parameter.numel() for parameter in network.parameters())
    return MadeDiffusion(digest, count, training.losses[-1])


def _ddpm(training: _Training, recipe: DdpmRecipe) -> tuple[Any, nn.Module]:
    """Return the pipeline of a trained DDPM, and its denoiser."""
    from diffusers import DDPMPipeline

    images, classes = training.images, list(training.data.table.classes)
    channels, size = images.images.shape[1:3]
    _require_divisible(size, 2 ** (len(recipe.channels) - 1))
    table = ConditionTable([*classes, ""], {"class_labels": torch.arange(len(classes) + 1)}, len(classes))
    network = training.build(lambda: recipes.build_ddpm(recipe, len(classes), size, channels))
    scheduler = recipes.build_scheduler(recipe)
    trained = train_denoiser(
        Denoiser(network, Process.of_scheduler(scheduler)),
        Examples(pixels_of(images.images), images.labels),
        table,
        recipe,
        training.checkpoint("denoiser"),
        training.record,
    )
    return DDPMPipeline(trained.network.cpu(), scheduler), trained.network  # type: ignore[no-untyped-call]


def _stable_diffusion(training: _Training, recipe: StableDiffusionRecipe, out: Path) -> tuple[Any, nn.Module]:
    """Return the pipeline of a trained Stable Diffusion, and its denoiser.

    The autoencoder is trained first. Latents and prompts are computed once, before the denoiser's training.
    """
    from diffusers import StableDiffusionPipeline

    images = training.images
    channels, size = images.images.shape[1:3]
    _require_divisible(size, recipe.downscale * 2 ** (len(recipe.channels) - 1))
    prompts = [recipe.prompt.replace("{label}", label) for label in training.data.table.classes]
    tokenizer = recipes.build_tokenizer(prompts, recipe.text_length)
    ends = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    parts: dict[str, Any] = {
        "vae": training.build(lambda: recipes.build_autoencoder(recipe, size, channels)),
        "text_encoder": training.build(lambda: recipes.build_text_encoder(recipe, len(tokenizer), ends)).eval(),
        "tokenizer": tokenizer,
        "unet": training.build(lambda: recipes.build_text_unet(recipe, size // recipe.downscale)),
        "scheduler": recipes.build_scheduler(recipe),
    }
    tokens = tokenizer([*prompts, ""], padding="max_length", max_length=recipe.text_length, return_tensors="pt")
    train_text_encoder(parts["text_encoder"], tokens.input_ids, recipe)
    train_autoencoder(parts["vae"], images.images, recipe, training.checkpoint("autoencoder"), training.record)
    mean, std = latents_of(parts["vae"], images.images, recipe.batch_size)
    components = Components(out, StableDiffusionPipeline.__name__, parts, {}, "")
    trained = train_denoiser(
        Denoiser(parts["unet"], Process.of_scheduler(parts["scheduler"])),
        Examples(mean, images.labels, std),
        encode_prompts(components, prompts, size, size),
        recipe,
        training.checkpoint("denoiser"),
        training.record,
    )
    parts["unet"] = trained.network
    models = {name: part.cpu() if isinstance(part, nn.Module) else part for name, part in parts.items()}
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**models, **absent), trained.network  # type: ignore[no-untyped-call]


def _require_divisible(size: int, step: int) -> None:
    if size % step:
        raise DataError(
            f"images of {size} pixels do not fit the recipe",
            f"it reduces {step} pixels to 1",
            f"set `size` in the data spec to a multiple of {step}",
        )


def _write(out: Path, pipeline: Any, card: DiffusionCard, data: LoadedData) -> str:  # noqa: ANN401 - of diffusers
    silence_logs()
    with tempfile.TemporaryDirectory(prefix="salun-diffusion-") as name:
        pipeline.save_pretrained(name, safe_serialization=True)
        if hasattr(pipeline, "tokenizer"):  # vocab.json and merges.txt, which every reader of CLIP tokenizers expects
            pipeline.tokenizer.backend_tokenizer.model.save(str(Path(name) / "tokenizer"))
        return write_diffusion(out, copies(Path(name)), card, data.split)
