"""Makes the first version of a diffusion line by training a small model of the real architecture here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun_core.config import parse
from salun_core.data import DataSpec, ImageSet, LoadedData, load_data
from salun_core.diffusion.conditions import ConditionTable, encode_prompts
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.latents import latents_of, pixels_of
from salun_core.diffusion.process import Process
from salun_core.errors import DataError
from salun_core.methods.checkpoint import FileCheckpoint
from salun_core.methods.diffusion.training import (
    DdpmRecipe,
    DenoiserRecipe,
    StableDiffusionRecipe,
    build_autoencoder,
    build_ddpm,
    build_scheduler,
    build_text_encoder,
    build_text_unet,
    build_tokenizer,
    train_autoencoder,
    train_denoiser,
    train_text_encoder,
)
from salun_core.methods.loop import OnEpoch
from salun_core.models.card import DiffusionCard, DiffusionEvaluation
from salun_core.models.checkpoint import CARD, SPLIT, Files, write_folder
from salun_core.models.diffusers_folder import Components, copies, document_bytes, folder_digest, hush, model_files
from salun_core.registry.versions import publish_head, stage_version
from salun_core.storage import FileStore

JUDGED = DiffusionEvaluation()
JUDGED_PIXELS = DiffusionEvaluation(guidance_scale=1.5)
"""Of a DDPM in pixels: pixels are clipped at every step, and more guidance than this drives them to the bounds."""


@dataclass(frozen=True)
class MadeDiffusion:
    """A diffusion model folder that was made.

    Args:
        digest: of the model.
        parameters: of its denoiser.
        loss: of its last epoch; None for one that was imported.
    """

    digest: str
    parameters: int
    loss: float | None


def ddpm_recipe(overrides: Mapping[str, Any] | None = None) -> DdpmRecipe:
    """Resolve the recipe of a class-conditional DDPM.

    Raises:
        UsageError: an unknown key, or a value out of range (all faults are listed).
    """
    return parse(DdpmRecipe, dict(overrides or {}), "recipe of ddpm")


def stable_diffusion_recipe(overrides: Mapping[str, Any] | None = None) -> StableDiffusionRecipe:
    """Resolve the recipe of a small Stable Diffusion; errors as for `ddpm_recipe`."""
    return parse(StableDiffusionRecipe, dict(overrides or {}), "recipe of stable-diffusion")


def train_ddpm(
    spec: DataSpec,
    recipe: DdpmRecipe,
    out: Path,
    evaluation: DiffusionEvaluation = JUDGED_PIXELS,
    checkpoints: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> MadeDiffusion:
    """Train a class-conditional DDPM in pixels, and write its model folder.

    Args:
        spec: the data; their size is the model's.
        recipe: widths and training.
        out: folder to write.
        evaluation: how its images shall be judged.
        checkpoints: folder that keeps the state after each epoch, to resume from; None keeps none.
        on_epoch: called after each epoch.

    Raises:
        DataError: the images are not square, or of a size that the U-Net cannot halve.
    """
    data, train = _read(spec)
    classes = list(data.table.classes)
    channels, size = train.images.shape[1:3]
    _require_divisible(size, 2 ** (len(recipe.channels) - 1))
    table = ConditionTable([*classes, ""], {"class_labels": torch.arange(len(classes) + 1)}, len(classes))
    network = _fresh(recipe, lambda: build_ddpm(recipe, len(classes), size, channels))
    scheduler = build_scheduler(recipe)
    losses, said = _followed(on_epoch)
    trained = train_denoiser(
        Denoiser(network, Process.of_scheduler(scheduler)),
        Examples(pixels_of(train.images), train.labels),
        table,
        recipe,
        _checkpoint(checkpoints, "denoiser"),
        said,
    )
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline(trained.network.cpu(), scheduler)  # type: ignore[no-untyped-call]
    card = _card("class-conditional", network, data, train, recipe, evaluation)
    return _write(out, pipeline, card, data, network, losses)


def train_stable_diffusion(
    spec: DataSpec,
    recipe: StableDiffusionRecipe,
    out: Path,
    evaluation: DiffusionEvaluation = JUDGED,
    checkpoints: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> MadeDiffusion:
    """Train a small Stable Diffusion, autoencoder first, and write its model folder; arguments as for `train_ddpm`.

    Latents and prompts are computed once, between the two trainings.
    """
    data, train = _read(spec)
    prompts = [recipe.prompt.replace("{label}", label) for label in data.table.classes]
    channels, size = train.images.shape[1:3]
    _require_divisible(size, recipe.shrinks * 2 ** (len(recipe.channels) - 1))
    tokenizer = build_tokenizer(prompts, recipe.text_length)
    ends = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    parts: dict[str, Any] = {
        "vae": _fresh(recipe, lambda: build_autoencoder(recipe, size, channels)),
        "text_encoder": _fresh(recipe, lambda: build_text_encoder(recipe, len(tokenizer), ends)).eval(),
        "tokenizer": tokenizer,
        "unet": _fresh(recipe, lambda: build_text_unet(recipe, size // recipe.shrinks)),
        "scheduler": build_scheduler(recipe),
    }
    tokens = tokenizer([*prompts, ""], padding="max_length", max_length=recipe.text_length, return_tensors="pt")
    train_text_encoder(parts["text_encoder"], tokens.input_ids, recipe)
    losses, said = _followed(on_epoch)
    train_autoencoder(parts["vae"], train.images, recipe, _checkpoint(checkpoints, "autoencoder"), said)
    mean, std = latents_of(parts["vae"], train.images, recipe.batch_size)
    table = encode_prompts(Components(out, _PIPELINE, parts, {}, ""), prompts, size, size)
    trained = train_denoiser(
        Denoiser(parts["unet"], Process.of_scheduler(parts["scheduler"])),
        Examples(mean, train.labels, std),
        table,
        recipe,
        _checkpoint(checkpoints, "denoiser"),
        said,
    )
    card = _card("text-to-image", trained.network, data, train, recipe, evaluation)
    card = card.model_copy(update={"prompt": recipe.prompt})
    return _write(out, _pipeline({**parts, "unet": trained.network}), card, data, trained.network, losses)


_PIPELINE = "StableDiffusionPipeline"


def _pipeline(parts: Mapping[str, Any]) -> Any:  # noqa: ANN401 - diffusers' pipelines
    import diffusers

    models = {name: part.cpu() if isinstance(part, nn.Module) else part for name, part in parts.items()}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, _PIPELINE)(**models, **absent)


def _read(spec: DataSpec) -> tuple[LoadedData, ImageSet]:
    data = load_data(spec)
    train = data.images("train")
    if train.images.shape[2] != train.images.shape[3]:
        raise DataError("images are not square", "", "set `size` in the data spec")
    return data, train


def _require_divisible(size: int, step: int) -> None:
    if size % step:
        raise DataError(
            f"images of {size} pixels do not fit the recipe",
            f"it halves them to 1 in {step}",
            f"set `size` in the data spec to a multiple of {step}",
        )


def _fresh(recipe: DenoiserRecipe, build: Callable[[], Any]) -> Any:  # noqa: ANN401 - of diffusers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build()


def _followed(on_epoch: OnEpoch | None) -> tuple[list[float], OnEpoch]:
    losses: list[float] = []

    def said(record: Any) -> None:  # noqa: ANN401 - an EpochRecord
        losses.append(next(iter(record.losses.values())))
        if on_epoch:
            on_epoch(record)

    return losses, said


def _checkpoint(folder: Path | None, name: str) -> FileCheckpoint | None:
    return FileCheckpoint(folder / f"{name}.safetensors") if folder else None


def _card(
    task: Any,  # noqa: ANN401 - a literal of the card
    network: nn.Module,
    data: LoadedData,
    train: ImageSet,
    recipe: DenoiserRecipe,
    evaluation: DiffusionEvaluation,
) -> DiffusionCard:
    channels, height, width = train.images.shape[1:]
    return DiffusionCard(
        task=task,
        architecture=type(network).__name__,
        classes=list(data.table.classes),
        channels=channels,
        height=height,
        width=width,
        data=data.spec,
        dataset_digest=data.split.dataset_digest,
        split_digest=data.split.digest,
        training=recipe.model_dump(mode="json"),
        evaluation=evaluation,
    )


def _write(
    out: Path,
    pipeline: Any,  # noqa: ANN401 - diffusers' pipelines
    card: DiffusionCard,
    data: LoadedData,
    network: nn.Module,
    losses: list[float],
) -> MadeDiffusion:
    hush()
    with tempfile.TemporaryDirectory(prefix="salun-diffusion-") as name:
        pipeline.save_pretrained(name, safe_serialization=True)
        if hasattr(pipeline, "tokenizer"):  # the two files that every tokenizer of CLIP's kind is read from
            pipeline.tokenizer.backend_tokenizer.model.save(str(Path(name) / "tokenizer"))
        files: Files = {**copies(Path(name)), CARD: document_bytes(card), SPLIT: document_bytes(data.split)}
        write_folder(out, files)
    count = sum(parameter.numel() for parameter in network.parameters())
    return MadeDiffusion(folder_digest(out), count, losses[-1] if losses else None)


def register_diffusion(store: FileStore, line: str, folder: Path, method: str, trained_on: int) -> str:
    """Publish a model folder of a diffusion model as the first version of a line.

    Args:
        store: where.
        line: name of the line; it must have no HEAD.
        folder: the model.
        method: train or import.
        trained_on: samples that it was trained on, 0 if they are not known.

    Returns:
        The version's digest.

    Raises:
        ConflictError: the line exists.
        UsageError: a file's name cannot be stored.
    """
    names = [*model_files(folder), CARD, SPLIT]
    fields = {"line": line, "parent": None, "method": method, "lineage": {"trained_on": trained_on}}
    version, _ = stage_version(store, fields, {name: folder / name for name in names})
    publish_head(store, line, version, None, None)
    return version
