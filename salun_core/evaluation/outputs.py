"""Outputs of a classifier on a set of images: the numbers that every metric is computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.device_memory import fitting
from salun_core.telemetry.progress import tracked

_AT_ONCE = 40 * 512  # images whose outputs are in memory: whole batches, so that the batches stay the same
TINY = 1e-30
"""Added to, or least value of, the argument of a logarithm, as in Song & Mittal's code: log(0) stays finite."""


@dataclass(frozen=True)
class Outputs:
    """Predictions for N images.

    Args:
        probabilities: float64 [N, K].
        losses: cross-entropy of each image with its true label, float64 [N], in nats.
        labels: true labels, int64 [N].
        logits: float64 [N, K]; None if only probabilities are known.
        weights: how much each image counts, float64 [N], if they are a sample that was drawn by class; None counts all
            alike. Comparisons that are matched by class have weights of their own.
    """

    probabilities: np.ndarray
    losses: np.ndarray
    labels: np.ndarray
    logits: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predictions(self) -> np.ndarray:
        """Most probable class, int64 [N]; the lowest id on a tie."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, bool [N]; a prediction from NaN is wrong."""
        finite = np.isfinite(self.probabilities).all(axis=1)
        return np.asarray((self.predictions == self.labels) & finite)

    @property
    def confidences(self) -> np.ndarray:
        """Probability of the true class, float64 [N]."""
        return np.asarray(self.probabilities[np.arange(len(self)), self.labels])

    @cached_property
    def margins(self) -> np.ndarray:
        """Logit of the true class minus the largest other logit, float64 [N]; negative for a wrong prediction.

        Its order does not change when all logits are multiplied by a positive constant, and it does not saturate:
        float32 losses of confident predictions are all 0. Without logits it is computed from log-probabilities, which
        differ from logits by a constant per sample.
        """
        scores = np.log(self.probabilities + TINY) if self.logits is None else self.logits
        rows = np.arange(len(self))
        others = scores.copy()
        others[rows, self.labels] = -np.inf
        with np.errstate(invalid="ignore"):  # of NaN or infinite logits; whoever needs numbers checks for them
            return np.asarray(scores[rows, self.labels] - others.max(axis=1, initial=-np.inf))

    def where(self, chosen: np.ndarray) -> Outputs:
        """Return the rows that a bool mask or an index array selects."""
        logits, weights = (None if item is None else item[chosen] for item in (self.logits, self.weights))
        return Outputs(self.probabilities[chosen], self.losses[chosen], self.labels[chosen], logits, weights)

    def mean(self, values: np.ndarray) -> float:
        """Return the mean of one value for each image, by their weights."""
        return float(values.mean() if self.weights is None else np.average(values, weights=self.weights))

    @property
    def accuracy(self) -> float:
        """Share of right predictions, by the weights of the images."""
        return self.mean(self.correct)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode without gradients, then restore the mode of each of its modules."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class Processes(Protocol):
    """The processes that share a computation; see `salun_core.methods.distributed.ProcessGroup`."""

    @property
    def rank(self) -> int:
        """Index of this process."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def gathered(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes in the order of their ranks, in every process."""
        ...


def outputs_of(
    model: nn.Module, images: ImageSource, batch_size: int = 512, processes: Processes | None = None
) -> Outputs:
    """Run a classifier over images in eval mode, without augmentation.

    Several processes each compute a range of whole batches, and get the outputs for all images. The batches are those
    of one process, and so are the bits on the same kind of device with as many threads.

    Args:
        model: on the device of the images.
        images: N of them, with true labels.
        batch_size: images per forward pass; fewer if the device has no room for them.
        processes: those that share the work, all with the same model and images; each reads its own images only.

    Returns:
        Its outputs, in the images' order.

    Raises:
        DeviceMemoryError: the device has no room for one image.
    """
    together = processes is not None and processes.size > 1
    mine = images.select(_own_batches(len(images), batch_size, processes)) if processes and together else images

    def run(size: int) -> list[Tensor]:
        batches = tracked(mine.batches(size), "evaluating", math.ceil(len(mine) / size))
        return [model(inputs).double() for inputs, _ in batches]

    with evaluation_mode(model):
        logits, _ = fitting(run, batch_size) if len(mine) else ([], 0)
    joined = torch.cat(logits) if logits else torch.empty(0, 2, dtype=torch.float64)
    if processes and together:
        joined = processes.gathered(joined.cpu()).to(images.labels.device)
    losses = torch.nn.functional.cross_entropy(joined, images.labels, reduction="none")
    probabilities, labels = joined.softmax(dim=1).cpu().numpy(), images.labels.cpu().numpy()
    return Outputs(probabilities, losses.cpu().numpy(), labels, joined.cpu().numpy())


def correct_of(model: nn.Module, images: ImageSource) -> np.ndarray:
    """Return whether each prediction is right, bool [N], in memory that does not grow with the images."""
    if len(images) <= _AT_ONCE:
        return outputs_of(model, images).correct
    parts = [range(start, min(start + _AT_ONCE, len(images))) for start in range(0, len(images), _AT_ONCE)]
    return np.concatenate([outputs_of(model, images.select(part)).correct for part in parts])


def _own_batches(samples: int, batch_size: int, processes: Processes) -> range:
    """Return the positions of the batches of one process."""
    batches = math.ceil(samples / batch_size)
    start, stop = (index * batches // processes.size * batch_size for index in (processes.rank, processes.rank + 1))
    return range(start, min(stop, samples))


def penultimate_features(
    model: nn.Module, batches: Callable[[int], Iterable[Tensor]], batch_size: int = 512
) -> Tensor | None:
    """Return the inputs of a model's last linear layer in eval mode, [N, D] on the CPU; None if it has no such layer.

    `batches` maps a batch size to inputs on the model's device. The batch size falls if the device has no room for it.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        return None
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).cpu()))

    def run(size: int) -> None:
        seen.clear()  # what an attempt with larger batches left
        for inputs in batches(size):
            model(inputs)

    try:
        with evaluation_mode(model):
            fitting(run, batch_size)
    finally:
        hook.remove()
    return torch.cat(seen) if seen else torch.empty(0, layers[-1].in_features)
