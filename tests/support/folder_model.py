"""A model folder laid out as diffusers writes it, with a few kilobytes of weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
WEIGHTS = (TEXT, UNET, VAE)


def write_folder(folder: Path, changed: int = 0) -> dict[str, Path]:
    """Write a model of which so many of the UNet's 20,000 weights were changed; return its files by name."""
    first = np.arange(20_000, dtype=np.float32)
    unet = np.where(first < changed, first + 0.5, first)
    for name, weights in ((UNET, unet), (VAE, first[::-4]), (TEXT, first[::5])):
        (folder / name).parent.mkdir(parents=True)
        save_file({"w": np.ascontiguousarray(weights)}, folder / name)
    documents = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": {"_class_name": "UNet2DConditionModel"},
        "vae/config.json": {"_class_name": "AutoencoderKL"},
        "text_encoder/config.json": {"architectures": ["CLIPTextModel"]},
        "tokenizer/vocab.json": {"<|startoftext|>": 0},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
        "model.json": {"split_digest": "0" * 64},
        "split.parquet": ["sample-1", "sample-2"],
    }
    for name, document in documents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(document))
    return files_in(folder)


def files_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by relative name."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the files of a folder hold, by relative name."""
    return {name: path.read_bytes() for name, path in files_in(folder).items()}
