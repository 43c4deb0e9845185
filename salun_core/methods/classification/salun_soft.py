"""SalUn-soft: random labelling, with a soft threshold on how far each weight moved in place of a mask.

    after each step  θ <- θ_o + S_t(θ - θ_o),    S_t(d) = sign(d) max(|d| - t, 0),    t = the q-quantile of |θ - θ_o|
    q = (1 - `soft_density`) (1 - s / S) after step s of S

Source: Fan et al., "SalUn", ICLR 2024 (the soft-thresholding variant): a proximal step for β ||θ - θ_o||_1 whose
strength falls linearly. t is the exact order statistic over all weights: of n weights the round(q n) that moved least
are back at θ_o, with its bits. After the last step q is 0, so nearly every weight of the result differs from the
original's; the result says what share did. Momentum is not thresholded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from salun_core.methods.classification import random_label
from salun_core.methods.classification.method import Method, Step, Stretch, Task
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import World
from salun_core.saliency.threshold import as_ordered, kth_largest


@torch.no_grad()
def shrink(model: nn.Module, original: nn.Module, share: float) -> None:
    """Threshold softly how far the weights moved, in place.

    Args:
        model: θ.
        original: θ_o, on the same device.
        share: q in [0, 1): of all weights, how many go back to the original's value; ties go back too.
    """
    pairs = list(zip(model.parameters(), original.parameters(), strict=True))
    total = sum(parameter.numel() for parameter, _ in pairs)
    back = round(share * total)
    if not back:
        return
    moved = [parameter - before for parameter, before in pairs]
    ordered, _ = kth_largest([as_ordered(change) for change in moved], total - back + 1)
    wide = torch.int64 if moved[0].dtype == torch.float64 else torch.int32
    threshold = torch.tensor([ordered], dtype=wide, device=moved[0].device).view(
        torch.float64 if wide == torch.int64 else torch.float32
    )
    for (parameter, before), change in zip(pairs, moved, strict=True):
        nearer = parameter - change.sign() * threshold
        parameter.copy_(torch.where(change.abs() <= threshold, before, nearer))


@dataclass(frozen=True)
class Softened:
    """A stretch of random labelling; after each of its steps the weights are drawn back.

    Args:
        inner: the stretch.
        task: model and original.
        first: number of steps of this epoch that come before it.
        of_epoch: number of steps of the whole epoch.
    """

    inner: Stretch
    task: Task
    first: int
    of_epoch: int

    @property
    def name(self) -> str:
        """For the history."""
        return self.inner.name

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.inner.device

    def __len__(self) -> int:
        return len(self.inner)

    def steps(self, batch_size: int) -> int:
        """Return the number of batches."""
        return self.inner.steps(batch_size)

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield the inner steps; the code after each `yield` runs when the optimiser has taken it."""
        assert self.task.model is not None
        assert self.task.original is not None
        settings = self.task.config
        for done, step in enumerate(self.inner.draw(config, generator, world), self.first + 1):
            yield step
            left = 1 - (self.task.epoch + done / self.of_epoch) / settings.epochs
            shrink(self.task.model, self.task.original, max(0.0, (1 - settings.soft_density) * left))


def parts(task: Task, generator: torch.Generator) -> Sequence[Softened]:
    """Return one epoch of random labelling, softened."""
    inner = random_label.parts(task, generator)
    counts = [part.steps(task.config.batch_size) for part in inner]
    return [Softened(part, task, sum(counts[:index]), sum(counts)) for index, part in enumerate(inner)]


METHOD = Method(parts, reads=frozenset({"soft_density"}), needs_original=True)
