"""The interface of a classifier's unlearning method: images, labels and a loss for each phase of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods import method
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.distributed import ProcessGroup, Share
from salun_core.methods.loop import OnEpoch, Phase, Step
from salun_core.saliency import SaliencyMask

C = TypeVar("C", bound=UnlearnConfig)
C_co = TypeVar("C_co", bound=UnlearnConfig, covariant=True)

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images [B, C, H, W], labels [B]) -> scalar to descend, a mean over the batch."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] and labels [B]."""
    return torch.nn.functional.cross_entropy(logits, labels)


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the model's outputs."""
    return cross_entropy(model(images), labels)


def dataset_phase(name: str, images: ImageSource, config: UnlearnConfig, loss: Loss = classification_loss) -> Phase:
    """Return a phase that visits every image once, in random order.

    Args:
        name: key of its loss in the history, such as forget, retain or mixed.
        images: training images with their target labels.
        config: batch size and augmentation.
        loss: loss to minimise.
    """

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        for share in shares(images, config, generator, group):
            yield share_step(loss, share)

    return Phase(name, images.labels.device, len(images), batches_of(images, config), draw)


def share_step(loss: Loss, share: Share) -> Step:
    """Return the step that descends the mean loss of a process's part of a batch."""

    def halves() -> Sequence[Step]:
        return [share_step(loss, half) for half in (share.halves() if share.count > 1 else (share,))]

    return Step(partial(_on_share, loss, share), share.count, share.weight, halves)


def _on_share(loss: Loss, share: Share, model: nn.Module) -> Tensor:
    return loss(model, share.images, share.labels)


def batches_of(images: ImageSource | int, config: UnlearnConfig) -> int:
    """Return the number of batches of one pass over images, or over so many of them."""
    return -(-(images if isinstance(images, int) else len(images)) // config.batch_size)


def shares(
    images: ImageSource, config: UnlearnConfig, generator: torch.Generator, group: ProcessGroup
) -> Iterator[Share]:
    """Yield this process's part of each batch of one pass; it reads no other images.

    All processes use the generator of the epoch in the same way.
    """
    left = len(images)
    for inputs, labels in images.batches(config.batch_size, generator, config.augment, group.part):
        yield group.share_of(inputs, labels, min(config.batch_size, left))
        left -= config.batch_size


def cycled(
    images: ImageSource, config: UnlearnConfig, generator: torch.Generator, group: ProcessGroup
) -> Iterator[Share]:
    """Yield this process's part of each batch indefinitely, reshuffled for each pass."""
    while True:
        yield from shares(images, config, generator, group)


def cycled_count(images: ImageSource, config: UnlearnConfig, batches: int) -> int:
    """Return the number of images in the first batches of `cycled`."""
    whole, rest = divmod(batches, batches_of(images, config))
    return whole * len(images) + min(rest * config.batch_size, len(images))


@dataclass(frozen=True)
class ClassifierContext(Generic[C_co]):
    """Inputs of a method.

    Args:
        forget: D_f with its true labels.
        retain: D_r with its true labels.
        num_classes: K, the number of the model's outputs.
        config: configuration of the method.
        model: the model in training.
        original: θ_o, frozen and in eval mode; set only for methods that need it.
        salient: boolean masks by parameter name, for methods that compute their own mask.
        epoch: index of the epoch, from 0.
        held_out: images that the model was not trained on, with true labels; only for methods that need them. They are
            the validation split, never the test split.
    """

    forget: ImageSource
    retain: ImageSource
    num_classes: int
    config: C_co
    model: nn.Module | None = None
    original: nn.Module | None = None
    salient: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    held_out: ImageSource | None = None

    @property
    def retain_count(self) -> int:
        """Number of images of D_r in each epoch, at least 1."""
        return max(1, round(self.config.drawn_share * len(self.retain)))

    def drawn(self, generator: torch.Generator) -> Self:
        """Return the context with a draw of `retain_count` images of D_r.

        Every process that has the generator's seed draws the same, and so does a run that resumes in its epoch.

        Args:
            generator: of the epoch. It is not used if all of D_r is trained on.
        """
        if self.config.drawn_share == 1:
            return self
        order = torch.randperm(len(self.retain), generator=generator)[: self.retain_count]
        return replace(self, retain=self.retain.select(order.sort().values))

    def phase(self, name: str, images: ImageSource, loss: Loss = classification_loss) -> Phase:
        """Return a phase that visits every image once; see `dataset_phase`."""
        return dataset_phase(name, images, self.config, loss)


@dataclass(frozen=True)
class Training:
    """What a method runs its training with."""

    mask: SaliencyMask | None
    checkpoint: CheckpointStore | None
    fingerprint: str
    on_epoch: OnEpoch | None
    group: ProcessGroup


@dataclass(frozen=True)
class Trained:
    """How a training went.

    Args:
        cost: in image passes.
        ended: why it ended, in words, if the method decided that.
    """

    history: list[EpochRecord]
    cost: float
    ended: str | None = None


@dataclass(frozen=True)
class ClassifierMethod(method.Method[C]):
    """One row of `METHODS`: the phases of an epoch, a training of its own, or a closed-form edit.

    Args:
        phases: (context, generator of the epoch) -> the phases of one epoch. The context's D_r is the epoch's own: if
            the method's settings are a `DrawingConfig`, a draw from it.
        begin: called before the first epoch and before a resume; changes the model in training or extends the context.
        finish: (model, K): restores the original's architecture after training.
        edit: closed form: changes the model in training once, without epochs.
        train: trains the context's model in place and decides itself how long; it measures its own strength, so that
            there is nothing to search for.
        passes: cost of the run in image passes (one image forward and backward); a forward pass alone counts 1/3.
            By default each image of each phase counts once. An epoch has `retain_count` images of D_r.
        reads_held_out: whether it measures the model on held-out images.
    """

    base_config = UnlearnConfig
    phases: Callable[[ClassifierContext[C], torch.Generator], Sequence[Phase]] | None = None
    begin: Callable[[ClassifierContext[C]], ClassifierContext[C]] | None = None
    finish: Callable[[nn.Module, int], None] | None = None
    edit: Callable[[ClassifierContext[C]], None] | None = None
    train: Callable[[ClassifierContext[C], Training], Trained] | None = None
    passes: Callable[[ClassifierContext[C]], float] | None = None
    reads_held_out: bool = False
    config_type: type[C] = field(default=UnlearnConfig, kw_only=True)  # type: ignore[assignment]

    @property
    def ways(self) -> tuple[object, ...]:
        """The phases of an epoch, a training of its own, or a closed-form edit."""
        return self.phases, self.train, self.edit

    def check(self, name: str, config: C) -> None:
        """Reject what fresh weights, or a method with a training of its own, cannot do.

        Raises:
            UsageError: batch norm is frozen, but fresh weights have no statistics to freeze; or the forget set is to
                be divided, but the method does not train on it, or measures all of it.
        """
        if self.fresh_start and config.batch_norm == "freeze":
            raise UsageError(
                f"{name} cannot freeze batch norm", "fresh weights have no statistics yet", "set batch_norm: update"
            )
        if (self.fresh_start or self.train) and config.forget_parts > 1:
            why = "it does not train on it" if self.fresh_start else "it measures all of it"
            raise UsageError(f"{name} cannot divide the forget set", why, "leave forget_parts out")

    def cost(self, context: ClassifierContext[C]) -> float:
        """Return the cost of all epochs in image passes; with thirds, if images only go forward."""
        if self.passes:
            return self.passes(context)
        assert self.phases is not None
        generator = torch.Generator().manual_seed(0)
        phases = self.phases(context.drawn(generator), generator)
        return context.config.epochs * sum(phase.samples for phase in phases)
