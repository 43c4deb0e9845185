"""What a classifier says of a set of images: the numbers that every metric is made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from salun_core.data.images import ImageSet


@dataclass(frozen=True)
class Outputs:
    """Predictions for N images.

    Args:
        probabilities: float64 [N, K].
        losses: cross-entropy of each image with its true label, float64 [N], in nats.
        labels: true labels, int64 [N].
    """

    probabilities: np.ndarray
    losses: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def predictions(self) -> np.ndarray:
        """Most probable class, int64 [N]; the lowest id on a tie."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, bool [N]; one that is not a number is wrong."""
        finite = np.isfinite(self.probabilities).all(axis=1)
        return np.asarray((self.predictions == self.labels) & finite)

    @property
    def confidences(self) -> np.ndarray:
        """Probability of the true class, float64 [N]."""
        return np.asarray(self.probabilities[np.arange(len(self)), self.labels])

    def where(self, chosen: np.ndarray) -> Outputs:
        """Return the rows that a bool mask or an index array names."""
        return Outputs(self.probabilities[chosen], self.losses[chosen], self.labels[chosen])


@torch.no_grad()
def outputs_of(model: nn.Module, images: ImageSet, batch_size: int = 512) -> Outputs:
    """Run a classifier over images in eval mode, without augmentation.

    Args:
        model: on the device of the images.
        images: N of them, with true labels.
        batch_size: images a forward pass.

    Returns:
        Its outputs, in the images' order.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    logits = [model(inputs).double() for inputs, _ in images.batches(batch_size)]
    for module, training in modes.items():
        module.training = training
    joined = torch.cat(logits) if logits else torch.empty(0, 2, dtype=torch.float64)
    losses = torch.nn.functional.cross_entropy(joined, images.labels, reduction="none")
    return Outputs(joined.softmax(dim=1).cpu().numpy(), losses.cpu().numpy(), images.labels.cpu().numpy())
