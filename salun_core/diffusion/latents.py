"""Conversion between images and denoiser inputs, with a disk cache for latents and embeddings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from salun_core.device_memory import fitting
from salun_core.diffusion.denoiser import require_finite
from salun_core.diffusion.sampling import Decode, to_bytes
from salun_core.digest import sha256_bytes

CACHE_VARIABLE = "SALUN_CACHE_DIR"
_SUM = "sha256"

Tensors = dict[str, Tensor]


def cached(kind: str, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """Return tensors from the disk cache, or compute and cache them; without `$SALUN_CACHE_DIR` nothing is cached.

    `key` is a digest of everything that the result depends on. A file is written under another name and renamed, so
    that other processes never read a partial file. A damaged or unwritable file only costs the computation.
    """
    root = os.environ.get(CACHE_VARIABLE, "").strip()
    if not root:
        return compute()
    path = Path(root) / kind / f"{key}.safetensors"
    found = _read(path)
    if found is None:
        found = compute()
        _write(path, found)
    return found


def _read(path: Path) -> Tensors | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            expected = (file.metadata() or {}).get(_SUM)
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None
    return tensors if expected == _sum(tensors) else None


def _sum(tensors: Tensors) -> str:
    return sha256_bytes(serialise({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _write(path: Path, tensors: Tensors) -> None:
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
        save_file(ready, part, metadata={_SUM: _sum(ready)})
        part.replace(path)
    except (OSError, SafetensorError):
        return


def pixels_of(images: Tensor) -> Tensor:
    """Convert uint8 images [N, C, H, W] to pixels from -1 to 1, float32."""
    return images.to(torch.float32).div_(127.5).sub_(1)


@torch.no_grad()
def latents_of(
    autoencoder: Any,  # noqa: ANN401 - diffusers' AutoencoderKL
    images: Tensor,
    batch_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Encode images once: mean and standard deviation of each latent, float32 [N, c, h, w] each, on the CPU.

        mean = (μ - shift) · scale,    std = σ · scale

    so that `mean + std · noise` is a new sample of the latent, as if the image were encoded again. Images are uint8
    [N, C, H, W] of the autoencoder's size. It computes in float32, because SDXL's overflows in float16. A latent that
    is not finite is a `ModelError`.
    """
    shift, scale = scaling(autoencoder)
    device, dtype = next(autoencoder.parameters()).device, autoencoder.dtype

    def encoded(part: Tensor) -> tuple[Tensor, Tensor]:
        latent = autoencoder.encode(pixels_of(part.to(device))).latent_dist
        return ((latent.mean - shift) * scale).cpu(), (latent.std * scale).cpu()

    try:
        autoencoder.to(torch.float32)
        parts, _ = fitting(lambda size: [encoded(part) for part in torch.split(images, size)], batch_size)
    finally:
        autoencoder.to(dtype)
    mean, deviation = (torch.cat(values) for values in zip(*parts, strict=True))
    return require_finite("latents", mean), require_finite("latents", deviation)


def scaling(autoencoder: Any) -> tuple[float, float]:  # noqa: ANN401
    """Return an autoencoder's shift and scale; a denoiser takes (latent - shift) · scale."""
    config = autoencoder.config
    return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)


def decoder(autoencoder: Any) -> Decode:  # noqa: ANN401
    """Return the function from scaled latents [B, c, h, w] to images uint8 [B, 3, H, W]."""
    shift, scale = scaling(autoencoder)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        unscaled = (latents / scale + shift).to(next(autoencoder.parameters()).device, autoencoder.dtype)

        def run(size: int) -> list[Tensor]:
            decoded = (autoencoder.decode(part).sample for part in torch.split(unscaled, size))
            return [to_bytes(require_finite("decoded images", part)) for part in decoded]

        return torch.cat(fitting(run, len(unscaled))[0])

    return decode
