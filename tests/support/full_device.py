"""A device without room for large batches: a network that reports it as torch does."""

import torch
from torch import nn


class Room:
    """Refuses batches above a limit in every forward pass, and keeps the sizes that it saw."""

    def __init__(self, limit: int) -> None:
        self.limit, self.refused, self.passed = limit, [], []

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        size = len(inputs[0])
        (self.refused if size > self.limit else self.passed).append(size)
        if size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.00 GiB. GPU 0 has 1.00 GiB.")

    def __deepcopy__(self, memo: object) -> "Room":
        return self  # copies of the network are on the same device


def limited(network: nn.Module, limit: int) -> Room:
    """Give a network, and its copies, a device with room for a number of samples."""
    room = Room(limit)
    network.register_forward_pre_hook(room)
    return room
