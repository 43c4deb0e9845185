"""Boundary shrink: the nearest wrong label of a linear model, and where the moved image may lie."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.methods.classification.boundary_shrink import nearest_wrong_labels
from tests.support.by_hand import FORGET, RATE, gradients, inputs, linear, run, softmax, weights


def by_hand(theta, images, labels, step):
    """One step along the sign of the slope in the pixels; then the best class that is not the label."""
    error = softmax(inputs(images) @ theta.T) - np.eye(len(theta))[labels.numpy()]
    moved = images.flatten(1).double().numpy() + step * np.sign(error @ theta[:, :-1])
    logits = moved @ theta[:, :-1].T + theta[:, -1]
    logits[np.arange(len(labels)), labels.numpy()] = -np.inf
    return logits.argmax(1)


@pytest.mark.parametrize("step", [0.01, 0.1, 1.0])
def test_labels_are_those_of_the_step_and_never_the_true_ones(step):
    images, labels = torch.randn(200, 3, 2, 2, generator=torch.Generator().manual_seed(5)), torch.arange(200) % 3
    model = linear()
    found = nearest_wrong_labels(model, images, labels, step, None)
    np.testing.assert_array_equal(found.numpy(), by_hand(weights(model), images, labels, step))
    assert not (found == labels).any()


class Watched(nn.Module):
    """A linear model that keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = linear(), []

    def forward(self, images):
        self.seen.append(images.detach())
        return self.inner(images)


def test_the_step_is_in_pixels_and_stays_in_their_range():
    normalisation = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    pixels = torch.randint(0, 256, (20, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = ImageSet(pixels, torch.arange(20) % 3, normalisation)
    ((images, labels),) = given.batches(20)
    model = Watched()
    nearest_wrong_labels(model, images, labels, 0.1, normalisation)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalisation.mean, normalisation.std))
    before, after = (seen * std + mean for seen in model.seen)
    assert float(after.min()) >= -1e-6
    assert float(after.max()) <= 1 + 1e-6
    inside = (before > 0.1) & (before < 0.9)
    torch.testing.assert_close((after - before).abs()[inside], torch.full((int(inside.sum()),), 0.1))


def test_training_uses_the_labels_of_the_original():
    original = weights(linear())
    labels = torch.tensor(by_hand(original, *FORGET, 0.1))
    theta = original
    for _ in range(3):
        theta = theta - RATE * gradients(theta, FORGET[0], labels).mean(0)
    result = run("boundary_shrink", epochs=3, adversarial_step=0.1)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert result.passes == 3 * 7 * 7 / 3
