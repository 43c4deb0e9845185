"""Converts a diffusers folder, local or from the hub's cache, to a model folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salun_core.config import parse, read_document
from salun_core.data import DataSpec, load_data
from salun_core.data.split import SplitManifest
from salun_core.diffusion.conditions import check_single_clip
from salun_core.digest import digest_json
from salun_core.errors import ModelError, UsageError
from salun_core.models.card import DiffusionCard, DiffusionEvaluation
from salun_core.models.diffusers_folder import (
    INDEX,
    Components,
    check_folder,
    copies,
    read_diffusers,
    refuse_pickle,
    write_diffusion,
)

_KEPT = {".json", ".txt", ".safetensors", ".model"}
_CLASS_CONDITIONAL = ("UNet2DModel", "DiTTransformer2DModel")
_EVALUATION = DiffusionEvaluation()


@dataclass(frozen=True)
class MadeDiffusion:
    """A new model folder of a diffusion model; `loss` is that of the last epoch of training, None for an import."""

    digest: str
    parameters: int
    loss: float | None


def import_diffusion(
    source: str,
    spec: DataSpec | None,
    out: Path,
    prompt: str = "an image of a {label}",
    evaluation: DiffusionEvaluation = _EVALUATION,
    classes: Sequence[str] = (),
    hub: bool = False,
    trainable_text_encoder: bool = False,
) -> MadeDiffusion:
    """Copy a diffusers folder to a model folder after checks: safetensors only, supported classes only.

    `source` is the folder, or a hub repository in the local cache; `hub` permits its download. `spec` is None if the
    images are generated; `classes` are then the names by id. `trainable_text_encoder` needs a single CLIP text encoder.
    """
    refuse_pickle(Path(source))
    found = Path(source) if Path(source).exists() else cached(source, hub)
    with tempfile.TemporaryDirectory(prefix="salun-import-") as name:
        staged = Path(name)
        _stage(found, staged)
        loaded = read_diffusers(staged)
        if trainable_text_encoder:
            check_single_clip(loaded.pipeline)
        data = load_data(spec) if spec else None
        names = list(data.table.classes) if data else list(classes)
        split = data.split if data else no_split(names)
        card = card_of(loaded, spec, split, names, prompt, evaluation)
        card = card.model_copy(update={"trainable_text_encoder": trainable_text_encoder})
        digest = write_diffusion(out, copies(staged), card, split)
    count = sum(parameter.numel() for parameter in loaded.network.parameters())
    return MadeDiffusion(digest, count, None)


def cached(name: str, fetch: bool = False) -> Path:
    """Return the folder of a repository (`owner/name`) in the hub's local cache; `fetch` downloads a missing one."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                local_files_only=not fetch,
                allow_patterns=[INDEX, *(f"*/*{suffix}" for suffix in sorted(_KEPT))],
            )
        )
    except Exception as error:  # the hub's client, its cache and the network raise different exceptions
        raise UsageError(
            f"there is no model {source_name(name)}",
            "it is neither a folder nor in the hub's local cache",
            "give the folder, or allow it to be fetched by --hub",
        ) from error


def source_name(text: str) -> str:
    """Return the user's source, shortened to one line."""
    return repr(text[:80])


def _stage(source: Path, target: Path) -> None:
    """Copy the components in the index; links of a hub folder are followed, and redundant pickled files are skipped."""
    if not (source / INDEX).is_file():
        check_folder(source)  # raises the error
    index = read_document(source / INDEX)
    shutil.copyfile(source / INDEX, target / INDEX)
    names = [name for name in index if (source / name).is_dir()] if isinstance(index, Mapping) else []
    for name in sorted(names):
        for path in _files(source / name):
            place = target / name / path.relative_to(source / name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _files(folder: Path) -> list[Path]:
    """Return the files to copy, without variants (`model.fp16.safetensors`) and pickled copies of safetensors files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if any(path.is_symlink() and not path.resolve().is_relative_to(_home(folder)) for path in [folder, *files]):
        raise UsageError(f"{folder.name} holds a link out of its folder", "it is not followed", "copy with `cp -rL`")
    whole = [path for path in files if path.suffix == ".safetensors" and "." not in _bare(path)]
    if not whole:
        return files
    return [path for path in files if path in whole or (path.suffix in _KEPT and path.suffix != ".safetensors")]


def _home(folder: Path) -> Path:
    """Return the root for links: the folder, or the repository's hub cache, whose snapshots are links."""
    model = folder.resolve().parent
    return model.parent.parent if model.parent.name == "snapshots" else model


def _bare(path: Path) -> str:
    return path.name.removesuffix(".safetensors")


def no_split(classes: Sequence[str]) -> SplitManifest:
    """Return the empty split of a model without data; its digest depends on the class names."""
    nothing: dict[str, str] = {}
    digest = digest_json({"classes": list(classes), "rows": []})
    return SplitManifest(dataset_digest=digest, train=nothing, validation=nothing, test=nothing)


def card_of(
    model: Components,
    spec: DataSpec | None,
    split: SplitManifest,
    classes: list[str],
    prompt: str,
    evaluation: DiffusionEvaluation,
) -> DiffusionCard:
    """Build the card of a diffusers folder from its configuration.

    UsageError lists all faults of classes and prompt.
    """
    kind = type(model.network).__name__
    channels, height, width = _size(model)
    fields = {
        "task": "class-conditional" if kind in _CLASS_CONDITIONAL else "text-to-image",
        "architecture": kind,
        "classes": classes,
        "prompt": prompt,
        "channels": channels,
        "height": height,
        "width": width,
        "data": spec.model_dump() if spec else None,
        "dataset_digest": split.dataset_digest,
        "split_digest": split.digest,
        "method": "import",
        "evaluation": evaluation.model_dump(),
    }
    return parse(DiffusionCard, fields, "the card of the import")


def _size(model: Components) -> tuple[int, int, int]:
    config: Any = model.network.config
    side = config.get("sample_size")
    if side is None:
        raise ModelError(
            "the denoiser does not state its image size", "sample_size is null", "set it in its config.json"
        )
    height, width = (side, side) if isinstance(side, int) else side
    vae = model.parts.get("vae")
    if vae is None:
        return int(config["in_channels"]), height, width
    step = 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.config.in_channels), height * step, width * step
