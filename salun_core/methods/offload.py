"""Tensors that a training step does not need on its device: kept in main memory, or in a temporary file without a name.

Two things are put away. The state of the optimiser is needed for one parameter at a time, so the optimiser steps by one
parameter after the other, and each has its state on the device only during its own step. The weights of the original
are not needed at all after they were copied, unless the method reads its outputs. The arithmetic is the same with and
without: torch's optimisers treat each parameter on its own.

The file is read and written, not mapped: mapped pages count as memory of the process. No other process can open it, and
the system frees it when this process ends, even by a kill. A process that dies between two writes leaves nothing that
a later one could read: a resumed run starts from its checkpoint.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from salun_core.errors import StoreError
from salun_core.storage.local_files import temporary_files

Place = Literal["none", "cpu", "disk"]
"""`none`: everything stays on the device; `cpu`: in main memory; `disk`: in the folder of temporary files."""


class Shelf:
    """Tensors of one process, by key, in main memory or in a file; a full or read-only disk is a `StoreError`."""

    def __init__(self, place: Place) -> None:
        self._file: int | None = None
        self._end = 0
        self._kept: dict[
            Hashable, tuple[Tensor, int]
        ] = {}  # its place in the file, or -1; the tensor has no bytes then
        if place == "disk":
            with _on_disk():
                file = tempfile.TemporaryFile(prefix="salun-offload-", buffering=0)  # noqa: SIM115 - closed with this
            self._file = file.fileno()
            weakref.finalize(self, file.close)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor; one that was put under the same key before, of the same shape and type, is replaced."""
        tensor = tensor.detach()
        if self._file is None or not tensor.numel():
            self._kept[key] = tensor.cpu(), -1
            return
        form, start = self._kept.get(key) or (torch.empty_like(tensor, device="meta"), self._end)
        if start == self._end:
            self._end += tensor.nbytes
        pending = _bytes_of(torch.empty_like(tensor, device="cpu").copy_(tensor))
        with _on_disk():
            while pending:
                done = os.pwrite(self._file, pending, start + tensor.nbytes - len(pending))
                pending = pending[done:]
        self._kept[key] = form, start

    def get(self, key: Hashable, device: torch.device) -> Tensor:
        """Return a tensor that was put, with its bits and its memory layout, on a device."""
        form, start = self._kept[key]
        if start < 0:
            return form.to(device)
        found = torch.empty_like(form, device="cpu")
        pending = _bytes_of(found)
        assert self._file is not None
        while pending:
            with _on_disk():
                done = os.preadv(self._file, [pending], start + form.nbytes - len(pending))
            if not done:
                raise StoreError("cannot read what was offloaded", "the temporary file ends early", "run it again")
            pending = pending[done:]
        return found.to(device)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a dense tensor in the order of its memory, sharing them."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8).numpy().data


_SHELVED = object()
_on_disk = partial(
    temporary_files,
    "cannot offload to the disk",
    "free some space there, set TMPDIR to a folder on a larger disk, or set offload: cpu",
)


class OffloadedOptimizer:
    """A torch optimiser that has the state of one parameter at a time on the device.

    It offers what the training loop and its checkpoints use. `state_dict` collects the state of all parameters.
    """

    def __init__(self, optimizer: Optimizer, place: Place) -> None:
        self._optimizer, self._shelf = optimizer, Shelf(place)
        self._away: dict[Tensor, dict[str, Any]] = {}  # entries by parameter; `_SHELVED` for those that were put away

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimiser."""
        return self._optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state that is on the device: all of it after `load_state_dict`, none after a step."""
        return self._optimizer.state

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Step by one parameter after the other; the same bits as one step by all of them."""
        for parameter in list(self.state):
            self._put(parameter)
        groups = self._optimizer.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._get(parameter)
                        self._optimizer.param_groups = [{**group, "params": [parameter]}]
                        self._optimizer.step()
                        self._put(parameter)
        finally:
            self._optimizer.param_groups = groups

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's own state dictionary, with the state of all parameters."""
        for parameter in list(self._away):
            self._get(parameter)
        whole = self._optimizer.state_dict()
        for parameter in list(self.state):
            self._put(parameter)
        return whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state."""
        self._away.clear()
        self._optimizer.load_state_dict(state)

    def _put(self, parameter: Tensor) -> None:
        entries = self.state.pop(parameter, {})  # SGD without momentum has none
        large = {key: value for key, value in entries.items() if isinstance(value, Tensor) and value.dim()}
        for key, value in large.items():
            self._shelf.put((parameter, key), value)
        self._away[parameter] = {**entries, **dict.fromkeys(large, _SHELVED)}  # `state_dict` has returned `entries`

    def _get(self, parameter: Tensor) -> None:
        entries = self._away.pop(parameter, None)
        if entries is not None:
            shelved = [key for key, value in entries.items() if value is _SHELVED]
            self.state[parameter] = entries | {
                key: self._shelf.get((parameter, key), parameter.device) for key in shelved
            }


def offloaded(optimizer: Optimizer, place: Place) -> Optimizer:
    """Return an optimiser that keeps its state in a place; the same one for `none`."""
    return optimizer if place == "none" else cast(Optimizer, OffloadedOptimizer(optimizer, place))


@contextmanager
def put_away(module: nn.Module, place: Place) -> Iterator[None]:
    """Free the memory of a module's parameters while the block runs; afterwards they have the same bits as before.

    The module must not be used in the block; a full disk of temporary files is a `StoreError`.
    """
    if place == "none":
        yield
        return
    shelf, device = Shelf(place), {parameter: parameter.device for parameter in module.parameters()}
    for parameter in device:
        shelf.put(parameter, parameter)
    for parameter in device:  # only when all of them are safe
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    try:
        yield
    finally:
        for parameter, where in device.items():
            parameter.data = shelf.get(parameter, where)
