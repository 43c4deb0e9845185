"""Reads foreign checkpoints (`.safetensors`, `.pt`, `.pth`, `.th`) without running code from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salun_core.errors import ModelError, UsageError
from salun_core.models.checkpoint import read_weights

_NESTED = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_TORCH_SUFFIXES = {".pt", ".pth", ".th"}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint without running code from it.

    A nested `state_dict` is unwrapped, and a prefix that all names share, such as `module.`, is removed. Names do not
    change otherwise.

    Args:
        path: `.safetensors`, or a torch file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        UsageError: the file does not exist, or has another suffix.
        ModelError: the file holds more than tensors, or no tensors.
    """
    if path.suffix == ".safetensors":
        return _stripped(read_weights(path))
    if path.suffix not in _TORCH_SUFFIXES:
        raise UsageError(
            f"{path.name} is not a checkpoint", f"its suffix is {path.suffix!r}", "give .safetensors, .pt, .pth or .th"
        )
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}", "the file does not exist", "check the path")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost any exception on damaged files, even AssertionError
        why = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot import {path.name}",
            f"it holds more than tensors, or is damaged ({why})",
            "save only its state_dict() and try again",
        ) from error
    return _stripped(_tensors(document, path))


def _tensors(document: Any, path: Path) -> dict[str, Tensor]:  # noqa: ANN401 - any document
    for key in _NESTED:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
    if not isinstance(document, Mapping) or not document:
        raise ModelError(
            f"{path.name} holds no state_dict", f"it is a {type(document).__name__}", "save its state_dict()"
        )
    strange = [str(name) for name, value in document.items() if not isinstance(value, Tensor)]
    if strange:
        raise ModelError(
            f"{path.name} holds more than tensors", f"such as {strange[0]!r}", "save only its state_dict()"
        )
    return {str(name): value for name, value in document.items()}


def _stripped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrapper prefixes (data parallelism, Lightning, torch.compile), including nested ones."""
    while prefix := next((one for one in _PREFIXES if state and all(name.startswith(one) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)
