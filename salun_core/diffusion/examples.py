"""Training examples of a denoiser: latents or pixels, each with the row of its condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salun_core.diffusion.denoiser import require_finite
from salun_core.diffusion.process import Process
from salun_core.errors import DataError


@dataclass(frozen=True)
class Examples:
    """Clean samples with their conditions, computed once.

    Args:
        mean: float32 [N, C, H, W]: pixels from -1 to 1, or the mean of the autoencoder's latent, scaled.
        condition: int64 [N]: rows of the condition table.
        std: scaled standard deviation of the latent, for a new sample at each visit. None: `mean` is exact.
        pseudo: int64 [N]: rows of the conditions c' that replace those of forget examples; None for other examples.
        ids: sample ids, if known.
    """

    mean: Tensor
    condition: Tensor
    std: Tensor | None = None
    pseudo: Tensor | None = None
    ids: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.condition):
            raise DataError("latents and conditions differ in number", "", "compute both from the same images")
        require_finite("latents", self.mean)

    def __len__(self) -> int:
        return len(self.condition)

    def to(self, device: torch.device | str) -> Examples:
        """Return the examples with their tensors on a device."""
        return self._map(lambda tensor: tensor.to(device), self.ids)

    def select(self, indices: Sequence[int] | Tensor) -> Examples:
        """Return the examples at these indices."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.condition.device)
        ids = [self.ids[position] for position in index.tolist()] if self.ids else ()
        return self._map(lambda tensor: tensor[index], ids)

    def joined(self, other: Examples) -> Examples:
        """Return these examples followed by others; a latent without a deviation gets 0.

        Other shapes are a `DataError`.
        """
        if self.mean.shape[1:] != other.mean.shape[1:]:
            raise DataError("two sets of examples cannot be joined", "their shapes differ", "use one size of image")
        both, std, pseudo = (self, other), None, None
        if any(item.std is not None for item in both):
            std = torch.cat([torch.zeros_like(item.mean) if item.std is None else item.std for item in both])
        if self.pseudo is not None and other.pseudo is not None:
            pseudo = torch.cat([self.pseudo, other.pseudo])
        mean, condition = torch.cat([self.mean, other.mean]), torch.cat([self.condition, other.condition])
        return Examples(mean, condition, std, pseudo, [*self.ids, *other.ids] if self.ids and other.ids else ())

    def with_pseudo(self, pseudo: Tensor) -> Examples:
        """Return the same examples with the rows of their replacement conditions, int64 [N]."""
        return replace(self, pseudo=pseudo)

    def _map(self, change: Callable[[Tensor], Tensor], ids: Sequence[str]) -> Examples:
        std = None if self.std is None else change(self.std)
        pseudo = None if self.pseudo is None else change(self.pseudo)
        return Examples(change(self.mean), change(self.condition), std, pseudo, ids)


@dataclass(frozen=True)
class Noised:
    """A batch of noisy examples.

    Args:
        noisy: x_t [B, C, H, W].
        times: int64 [B].
        target: target of the network's prediction, [B, C, H, W].
        condition: int64 [B]: rows of c.
        pseudo: int64 [B]: rows of c', of forget examples.
    """

    noisy: Tensor
    times: Tensor
    target: Tensor
    condition: Tensor
    pseudo: Tensor | None = None

    def __len__(self) -> int:
        return len(self.times)

    def select(self, index: Tensor) -> Noised:
        """Return the rows at these indices, int64."""
        pseudo = None if self.pseudo is None else self.pseudo[index]
        return Noised(self.noisy[index], self.times[index], self.target[index], self.condition[index], pseudo)


def noised(examples: Examples, process: Process, generator: torch.Generator, times: Tensor | None = None) -> Noised:
    """Noise examples at random times; `times`, int64 [B], are drawn uniformly by default.

    The generator draws latents, noise and times, in this order; on the CPU, so that all devices get the same values.
    """
    shape, device = examples.mean.shape, examples.mean.device
    clean = examples.mean
    if examples.std is not None:
        clean = clean + examples.std * torch.randn(shape, generator=generator).to(device)
    noise = torch.randn(shape, generator=generator).to(device)
    times = (process.draw_times(len(examples), generator) if times is None else times).to(device)
    target = process.target(clean, noise, times)
    return Noised(process.noisy(clean, noise, times), times, target, examples.condition, examples.pseudo)


def endless(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches indefinitely; each pass covers every example once, in a new order.

    The generator is on the CPU, and there is at least one example.
    """
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]
