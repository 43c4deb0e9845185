"""State of the training loop after an epoch: weights, optimiser and history. Stored as safetensors, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.optim import Optimizer

from salun_core.errors import ConflictError, IntegrityError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.sharded import load_whole, sharded_like, whole
from salun_core.storage.local_files import write_whole

FORMAT = "salun.checkpoint/v1"
_HEADER, _DIGEST = "header", "digest"
_START, _LOOP = "start/", "loop"


class CheckpointStore(Protocol):
    """Stores the latest state of the loop."""

    def load(self) -> bytes | None:
        """Return the latest state, or None."""
        ...

    def save(self, data: bytes) -> None:
        """Replace the latest state atomically."""
        ...


@dataclass(frozen=True)
class FileCheckpoint:
    """A checkpoint in a local file."""

    path: Path

    def load(self) -> bytes | None:
        """Return the bytes of the file, or None if it does not exist."""
        return self.path.read_bytes() if self.path.is_file() else None

    def save(self, data: bytes) -> None:
        """Replace the file atomically; an error of the disk is a `StoreError`."""
        write_whole(self.path, data)


@dataclass(frozen=True)
class StageCheckpoint:
    """The checkpoint of a loop that is one stage of a run."""

    inner: CheckpointStore
    header: Mapping[str, Any]
    start: Mapping[str, Tensor]
    resumed: bytes | None

    def load(self) -> bytes | None:
        """Return the state of the loop in an earlier process, or None."""
        return self.resumed

    def save(self, data: bytes) -> None:
        """Replace the state of the run atomically."""
        loop = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        start = {_START + name: value for name, value in self.start.items()}
        self.inner.save(sealed(self.header, {**start, _LOOP: loop}))

    @staticmethod
    def start_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the stage of a stored state began with."""
        return {name.removeprefix(_START): value for name, value in tensors.items() if name.startswith(_START)}

    @staticmethod
    def loop_of(tensors: Mapping[str, Tensor]) -> bytes:
        """Return the state of the loop in a stored state."""
        return tensors[_LOOP].numpy().tobytes()


def snapshot(
    fingerprint: str, model: nn.Module, optimizer: Optimizer, history: Sequence[EpochRecord], kept: bool = True
) -> bytes:
    """Serialise the state of a loop to a safetensors document; empty if `kept` is false.

    Sharded tensors are collected one by one, so every process must take part.
    """
    state = optimizer.state_dict()
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        plain[str(index)] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        tensors |= {f"optimizer/{index}/{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
    header = {
        "fingerprint": fingerprint,
        "history": [record.model_dump() for record in history],
        "groups": state["param_groups"],
        "plain": plain,
    }
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found = whole(value)
        if kept:
            stored[name] = found.cpu()
    return sealed(header, stored) if kept else b""


def sealed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise a header, which becomes JSON, and tensors to a safetensors document with a digest over both."""
    text = json.dumps({"format": FORMAT, **header})
    document = {**tensors, _HEADER: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in document.items()}
    return serialise({**stored, _DIGEST: _digest(stored)})


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    """Return the SHA-256 over names, types, shapes and bytes, as uint8 [32]."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(hasher.digest()), dtype=torch.uint8)


def restore(store: CheckpointStore, fingerprint: str, model: nn.Module, optimizer: Optimizer) -> list[EpochRecord]:
    """Load the latest state into a model and its optimiser, and return the history; empty without a checkpoint.

    The checkpoint of another run is a `ConflictError`, a damaged one an `IntegrityError`.
    """
    data = store.load()
    if data is None:
        return []
    header, tensors = opened(data)
    require_run(header, fingerprint)
    load_whole(
        model, {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    )
    optimizer.load_state_dict(_optimizer_state(header, tensors, optimizer))
    _restore_layout(optimizer)
    return [EpochRecord(**record) for record in header["history"]]


def require_run(header: Mapping[str, Any], fingerprint: str) -> None:
    """Raise `ConflictError` if a checkpoint belongs to another run."""
    if header["fingerprint"] != fingerprint:
        raise ConflictError(
            "the checkpoint belongs to another run",
            "its configuration or data differ",
            "delete it, or give another folder",
        )


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a document that `sealed` wrote; a damaged one is an `IntegrityError`."""
    try:
        tensors = deserialise(data)
        digest = tensors.pop(_DIGEST)
        if not torch.equal(digest, _digest(tensors)):
            raise ValueError("its content does not match its digest")
        header = json.loads(bytes(tensors.pop(_HEADER).numpy()))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise IntegrityError("checkpoint is damaged", str(error), "delete it and start again") from error
    if header["format"] != FORMAT:
        raise IntegrityError("checkpoint is of another format", str(header["format"]), "delete it and start again")
    return header, tensors


def _restore_layout(optimizer: Optimizer) -> None:
    """Give moments the memory layout of their weights: the optimiser takes a slower path for mixed layouts."""
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _optimizer_state(header: dict[str, Any], tensors: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in header["plain"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            like = parameters[int(index)]
            state[int(index)][key] = sharded_like(value, like) if value.shape == like.shape else value
    groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in header["groups"]]
    return {"state": state, "param_groups": groups}
