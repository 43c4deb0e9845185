"""NegGrad+: descend the loss of the retain set and climb that of the forget set in every step.

    min_θ  α E_{(x, y) in D_r} CE(f_θ(x), y)  -  (1 - α) E_{(x, y) in D_f} CE(f_θ(x), y)

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023 (their tuned form of NegGrad).
An epoch is one pass over D_r; each of its batches is paired with one of D_f, which is gone through again in a new
order whenever it is used up. The authors repeat the order of the first time, and do not clip the gradient; without
that the loss of a whole class, which has no bound, takes the rest with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from salun_core.methods.classification.method import Method, Step, Task, augmented, cross_entropy, cycled, cycled_count
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import Share, World


@dataclass(frozen=True)
class Paired:
    """Every retain image once, in random order, each batch beside one of forget images.

    Args:
        task: what to forget and to keep.
    """

    task: Task

    @property
    def name(self) -> str:
        """For the history."""
        return "paired"

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.task.retain.labels.device

    def __len__(self) -> int:
        return len(self.task.retain)

    def steps(self, batch_size: int) -> int:
        """Return the number of retain batches."""
        return -(-len(self.task.retain) // batch_size)

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield one step a retain batch; its loss is this process's summand of the batch's loss."""
        retained = self.task.retain.batches(config.batch_size, generator, augmented(config))
        forgotten = cycled(self.task.forget, config, generator)
        for retain, forget in zip(retained, forgotten, strict=False):
            yield Step(partial(self._loss, world.share(*retain), world.share(*forget)), len(retain[1]), 1.0)

    def _loss(self, retain: Share, forget: Share, model: nn.Module) -> torch.Tensor:
        alpha = self.task.config.retain_weight
        kept = cross_entropy(model(retain.images), retain.labels) * retain.weight
        forgotten = cross_entropy(model(forget.images), forget.labels) * forget.weight
        return alpha * kept - (1 - alpha) * forgotten


def parts(task: Task, generator: torch.Generator) -> Sequence[Paired]:
    """Return one epoch: D_r, paired."""
    return [Paired(task)]


def passes(task: Task) -> float:
    """Return images forward and backward: D_r and as many batches of D_f, each epoch."""
    steps = -(-len(task.retain) // task.config.batch_size)
    forgotten = cycled_count(len(task.forget), task.config.batch_size, steps)
    return task.config.epochs * (len(task.retain) + forgotten)


METHOD = Method(parts, defaults={"gradient_clip": 1.0}, reads=frozenset({"retain_weight"}), passes=passes)
