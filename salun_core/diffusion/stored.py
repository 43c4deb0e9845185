"""Keeps latents and embeddings on the disk, by the digest of what they were computed from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from salun_core.digest import sha256_bytes

CACHE_VARIABLE = "SALUN_CACHE_DIR"
_SUM = "sha256"

Tensors = dict[str, Tensor]


def remembered(kind: str, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """Return what was computed before, or compute and keep it; without `$SALUN_CACHE_DIR` nothing is kept.

    A file that is damaged, or that cannot be written, costs the computation again and nothing else.

    Args:
        kind: names the folder.
        key: digest of all that the result depends on.
        compute: tensors by name.
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
            promised = (file.metadata() or {}).get(_SUM)
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None
    return tensors if promised == _sum(tensors) else None


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
