"""Batches that do not fit into the memory of the device: the batch is halved until it does, or the error says why not.

Two rules keep results comparable. What is computed for each sample on its own (outputs, features, generated images)
may use any batch size. What is summed over a batch may not: a training step divides its batch into parts whose
gradients add up to the batch's, and the chunks of saliency scores stay as they are, because their size determines the
bits of the mask.

How much memory a model needs is predicted by `TrainingMemory`, without a device that has it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from salun_core.errors import DeviceMemoryError

T = TypeVar("T")

_MORE = "use a device with more memory, stop other programs on it, or compute on the CPU"


def fitting(work: Callable[[int], T], size: int, least: int = 1) -> tuple[T, int]:
    """Do work in batches of a size, and all of it again in batches of half that size if the device has no room.

    `work` takes the batch size and starts from the beginning in each call. Returns (result, batch size that fits).
    Raises DeviceMemoryError if a batch of `least` does not fit.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError as error:
            if size <= least:
                raise _no_room(error, f"a batch of {size} does not fit", _MORE) from error
        # Outside the handler: the exception refers to the frames of the failed attempt, and so to its tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(least, size // 2)


@contextmanager
def explained(why: str = "", remedy: str = f"set a smaller batch_size, or {_MORE}") -> Iterator[None]:
    """Raise a lack of memory on the device as DeviceMemoryError with cause and remedy; also a decorator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _no_room(error, why, remedy) from error


def _no_room(error: torch.OutOfMemoryError, why: str, remedy: str) -> DeviceMemoryError:
    reported = " ".join(str(error).split())[:160].rstrip(".")  # how much was free, and how much was asked for
    return DeviceMemoryError("out of memory on the device", "; ".join(filter(None, [why, reported])), remedy)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside it and still live, and their peak.

    Tensors in `known`, and their views, are not counted.
    """

    def __init__(self, known: Iterator[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self.moments: list[int] = []  # live bytes whenever a tensor was created
        self._seen = {tensor.untyped_storage()._cdata for tensor in known or ()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation and count the tensors that it creates."""
        made = func(*args, **(kwargs or {}))
        for item in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(item, Tensor) and item.device.type != "meta":  # simulated tensors claim to be on the CPU
                self._note(item.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.moments.append(self.live)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True)
class TrainingMemory:
    """Predicts the memory of scoring and of training steps. All sizes are in bytes, all weights in float32.

        scoring(n) = 4 P + pass(n)
        step(n) = 4 P (1 + copies) + state P + mask P + max(pass(n), 4 P + update)
        pass(n) = max over all moments t of a pass: fixed_t + n each_t

    P is the number of weights. A pass goes forward and backward: it holds activations, gradients and, in bf16, the cast
    weights. Activations leave while gradients arrive, so the moment of the peak depends on n. `copies` are the
    original, unless it is offloaded, and what the method keeps frozen. `state` is 8 for Adam and AdamW, 4 for SGD with
    momentum, and 0 without momentum or if it is offloaded. `mask` is 1, or 0 without a mask. `update` is 4 P
    for Adam and AdamW on a GPU, where torch updates many tensors at once, and 0 elsewhere or if the state is offloaded.

    Not in it: Python and its libraries, the context and the workspaces of a GPU, the encoders of a diffusion model, the
    images, and what an allocator loses to fragments.

    `parameters` is P. `moments` has (fixed_t, each_t) only of moments that are the peak of some n.
    """

    parameters: int
    moments: Sequence[tuple[int, int]]

    @classmethod
    def of(
        cls, network: nn.Module, loss: Callable[[nn.Module, int], Tensor], precision: Literal["float32", "bf16"]
    ) -> TrainingMemory:
        """Simulate passes with two and with three examples; no value is computed, and no memory is needed.

        The network may be on any device, also meta, with gradient checkpointing if the training has it. `loss` maps
        (network, number of examples) to a scalar; it creates its inputs itself, on the CPU.
        """
        two, three = (_simulated(network, loss, count, precision == "bf16") for count in (2, 3))
        lines = {(3 * low - 2 * high, high - low) for low, high in zip(two, three, strict=True)}
        return cls(sum(parameter.numel() for parameter in network.parameters()), _upper(lines))

    def scoring(self, examples: int) -> int:
        """Return the peak of scoring in bytes; `examples` go through the network at once."""
        return 4 * self.parameters + self._passes(examples)

    def step(
        self,
        examples: int,
        optimizer: Literal["adam", "adamw", "sgd"],
        *,
        momentum: float = 0.9,
        offload: bool = False,
        frozen_copies: int = 0,
        masked: bool = True,
        gpu: bool = False,
    ) -> int:
        """Return the peak of a training step in bytes.

        `examples` go through the network at once: for `salun`, forget and retain examples together. `offload` means
        that state and original are outside the device; `frozen_copies` are copies of the network that the method keeps,
        such as 1 for `esd`.
        """
        state = {"sgd": 4 if momentum else 0}.get(optimizer, 8)
        fixed = 4 * (1 + frozen_copies) + masked + (0 if offload else 4 + state)
        update = 4 if gpu and not offload and optimizer != "sgd" else 0
        return fixed * self.parameters + max(self._passes(examples), (4 + update) * self.parameters)

    def _passes(self, examples: int) -> int:
        return max(fixed + examples * each for fixed, each in self.moments)


def _upper(lines: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the lines (fixed, each) that no other line is above for every number of examples."""
    kept: list[tuple[int, int]] = []
    for fixed, each in sorted(lines, key=lambda line: (-line[1], -line[0])):
        if not kept or fixed > kept[-1][0]:
            kept.append((fixed, each))
    return tuple(kept)


def _simulated(network: nn.Module, loss: Callable[[nn.Module, int], Tensor], count: int, bf16: bool) -> list[int]:
    """Return the live bytes, without the weights, at each moment of a forward and a backward pass."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        faked = {id(tensor): _faked(tensor) for tensor in (*network.parameters(), *network.buffers())}
    model: nn.Module = copy.deepcopy(network, dict(faked))  # the memo replaces each tensor: nothing is copied
    with mode, LiveBytes(iter(faked.values())) as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, count)
        value.backward()  # type: ignore[no-untyped-call]
    moments: list[int] = counted.moments
    return moments


def _faked(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
