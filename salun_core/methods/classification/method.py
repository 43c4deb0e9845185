"""What a method is: which images, under which labels and which loss, make up one epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSet
from salun_core.methods.config import LoopConfig, UnlearnConfig
from salun_core.methods.distributed import World

Loss = Callable[[Tensor, Tensor], Tensor]
ModelLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] and labels [B]."""
    return torch.nn.functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Step:
    """This process's part of one step of the loop.

    Args:
        loss: model -> mean loss over this process's samples, a scalar.
        samples: how many they are.
        weight: their share of the step's batch.
    """

    loss: Callable[[nn.Module], Tensor]
    samples: int
    weight: float


class Stretch(Protocol):
    """What the loop trains on for a while: a part of an epoch."""

    @property
    def name(self) -> str:
        """For the history."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    def __len__(self) -> int:
        """Return the samples of all its steps, over all processes."""
        ...

    def steps(self, batch_size: int) -> int:
        """Return the number of its steps."""
        ...

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield its steps; all that is random comes from the generator."""
        ...


@dataclass(frozen=True)
class Part:
    """A stretch of an epoch: every image once, in random order.

    Args:
        name: for the history: forget, retain or mixed.
        images: what to train on, with the labels to train towards.
        loss: (logits, labels) -> scalar to descend.
    """

    name: str
    images: ImageSet
    loss: Loss = cross_entropy

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.labels.device

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int) -> int:
        """Return the number of batches."""
        return -(-len(self.images) // batch_size)

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield one step a batch."""
        return ModelPart(self.name, self.images, self._loss).draw(config, generator, world)

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(model(images), labels)


@dataclass(frozen=True)
class ModelPart:
    """A stretch like `Part`, for a loss that logits and labels alone do not give.

    Args:
        name: for the history.
        images: what to train on.
        loss: (model, images [B, C, H, W], labels [B]) -> scalar to descend, a mean over the batch.
    """

    name: str
    images: ImageSet
    loss: ModelLoss

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.labels.device

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int) -> int:
        """Return the number of batches."""
        return -(-len(self.images) // batch_size)

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield one step a batch."""
        for images, labels in self.images.batches(config.batch_size, generator, augmented(config)):
            share = world.share(images, labels)
            loss = partial(self._shared, share.images, share.labels)
            yield Step(loss, share.count, share.weight)

    def _shared(self, images: Tensor, labels: Tensor, model: nn.Module) -> Tensor:
        return self.loss(model, images, labels)


def augmented(config: LoopConfig) -> bool:
    """Return whether training images are augmented, if the data spec says how."""
    return bool(getattr(config, "augment", True))


def cycled(images: ImageSet, config: LoopConfig, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, in a new order each time that the images are used up."""
    while True:
        yield from images.batches(config.batch_size, generator, augmented(config))


def cycled_count(images: int, batch_size: int, batches: int) -> int:
    """Return how many images the first batches of `cycled` have."""
    whole, rest = divmod(batches, -(-images // batch_size))
    return whole * images + min(rest * batch_size, images)


@dataclass(frozen=True)
class Task:
    """What a method gets to work with.

    Args:
        forget: D_f with its true labels.
        retain: D_r with its true labels.
        num_classes: K, the model's outputs.
        order: sequential or mixed.
        config: of the method.
        model: the one in training.
        original: θ_o, frozen and in eval mode; only for methods that ask for it.
        salient: bool by parameter name, for methods that make a mask themselves.
        epoch: from 0.
    """

    forget: ImageSet
    retain: ImageSet
    num_classes: int
    order: Literal["sequential", "mixed"]
    config: UnlearnConfig = field(default_factory=UnlearnConfig)
    model: nn.Module | None = None
    original: nn.Module | None = None
    salient: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: int = 0


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`: parts of an epoch for the loop, or an edit in closed form.

    Args:
        parts: (task, generator) -> the parts of one epoch; the generator is the epoch's own.
        needs_mask: whether it trains salient weights only.
        fresh_start: whether it begins from fresh weights.
        defaults: configuration that differs from `UnlearnConfig`'s defaults.
        reads: the keys of the configuration that only some methods have, and this one has.
        needs_original: whether it asks the model before.
        begin: changes the model in training, or adds to the task, before the first epoch and before a resume.
        finish: (model, K): changes the trained model back into the original's architecture.
        edit: in closed form: changes the model in training once; there are no epochs then.
        passes: what the whole run costs in images forward and backward; an image that only goes forward counts
            1/3. By default each image of each part counts once.
    """

    parts: Callable[[Task, torch.Generator], Sequence[Stretch]] | None = None
    needs_mask: bool = False
    fresh_start: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    needs_original: bool = False
    begin: Callable[[Task], Task] | None = None
    finish: Callable[[nn.Module, int], None] | None = None
    edit: Callable[[Task], None] | None = None
    passes: Callable[[Task], float] | None = None
