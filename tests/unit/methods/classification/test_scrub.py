"""SCRUB: the divergence against numpy, the order of its passes, and steps by hand."""

import numpy as np
import pytest
import torch

from salun_core.methods.classification.scrub import divergence
from tests.support.by_hand import (
    FORGET,
    RATE,
    RETAIN,
    gradients,
    image_set,
    inputs,
    linear,
    losses,
    net,
    run,
    softmax,
    weights,
)


def kl(old, new, temperature):
    p, q = softmax(old / temperature), softmax(new / temperature)
    return (p * (np.log(p) - np.log(q))).sum(1).mean() * temperature**2


def kl_gradient(old, theta, images, temperature):
    """d/dθ of `kl`: T (q - p) x^T, averaged."""
    x = inputs(images)
    error = temperature * (softmax(x @ theta.T / temperature) - softmax(x @ old.T / temperature))
    return error.T @ x / len(x)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_divergence_is_that_of_the_original_from_the_new(temperature):
    old, new = np.random.default_rng(0).normal(size=(2, 5, 4))
    found = divergence(torch.tensor(new), torch.tensor(old), temperature)
    assert float(found) == pytest.approx(kl(old, new, temperature), rel=1e-9)
    assert float(found) > 0
    assert float(divergence(torch.tensor(old), torch.tensor(old), temperature)) == pytest.approx(0, abs=1e-12)


def test_max_steps_end_after_the_first_epochs():
    original = weights(linear())
    theta, expected = original, []
    for epoch in range(3):
        if epoch < 2:
            expected.append(-kl(inputs(FORGET[0]) @ original.T, inputs(FORGET[0]) @ theta.T, 2.0))
            theta = theta + RATE * kl_gradient(original, theta, FORGET[0], 2.0)
        x = inputs(RETAIN[0])
        expected.append(0.3 * kl(x @ original.T, x @ theta.T, 2.0) + 0.9 * losses(theta, *RETAIN).mean())
        slope = 0.3 * kl_gradient(original, theta, RETAIN[0], 2.0) + 0.9 * gradients(theta, *RETAIN).mean(0)
        theta = theta - RATE * slope
    result = run("scrub", epochs=3, ascent_epochs=2, distillation_weight=0.3, label_weight=0.9, temperature=2.0)
    np.testing.assert_allclose(weights(result.model), theta, atol=3e-6)
    assert [list(record.losses) for record in result.history] == [["forget", "retain"]] * 2 + [["retain"]]
    found = [value for record in result.history for value in record.losses.values()]
    assert found == pytest.approx(expected, abs=1e-5)
    assert result.passes == np.ceil((2 * 7 + 3 * 20) * 4 / 3)


def test_batch_statistics_give_the_first_ascent_a_direction():
    losses_of = {}
    for policy in ("freeze", "update"):
        model = net()
        model.drop.p = 0.0
        result = run("scrub", model, image_set(12, 1), image_set(20, 2), batch_norm=policy)
        losses_of[policy] = result.history[0].losses["forget"]
    assert losses_of["freeze"] == pytest.approx(0, abs=1e-6)
    assert losses_of["update"] < -1e-4
