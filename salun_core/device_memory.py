"""Batches that do not fit into the memory of the device: the batch is halved until it does, or the error says why not.

Two rules keep results comparable. What is computed for each sample on its own (outputs, features, generated images)
may use any batch size. What is summed over a batch may not: a training step divides its batch into parts whose
gradients add up to the batch's, and the chunks of saliency scores stay as they are, because their size determines the
bits of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from salun_core.errors import DeviceMemoryError

T = TypeVar("T")

_MORE = "use a device with more memory, stop other programs on it, or compute on the CPU"


def fitting(work: Callable[[int], T], size: int, least: int = 1) -> tuple[T, int]:
    """Do work in batches of a size, and all of it again in batches of half that size if the device has no room.

    Args:
        work: takes the batch size, and starts from the beginning in each call.
        size: batch size to begin with.
        least: batch size that is not halved again.

    Returns:
        (result, batch size that fits).

    Raises:
        DeviceMemoryError: a batch of `least` does not fit either.
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
    """Turn a device that is out of memory into an error with cause and remedy; also usable as a decorator.

    Args:
        why: what did not fit, if it is known.
        remedy: what to change.

    Raises:
        DeviceMemoryError: the block ran out of memory on the device.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _no_room(error, why, remedy) from error


def _no_room(error: torch.OutOfMemoryError, why: str, remedy: str) -> DeviceMemoryError:
    reported = " ".join(str(error).split())[:160].rstrip(".")  # how much was free, and how much was asked for
    return DeviceMemoryError("out of memory on the device", "; ".join(filter(None, [why, reported])), remedy)
