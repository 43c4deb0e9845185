"""l1-sparse against a gradient step by hand."""

import numpy as np
import pytest

from tests.support.by_hand import RATE, RETAIN, gradients, linear, losses, run, weights


def test_the_strength_of_the_penalty_falls_with_the_epochs():
    theta, gamma = weights(linear()), 0.02
    expected = []
    for factor in (1.0, 0.75, 0.5, 0.25):
        expected.append(losses(theta, *RETAIN).mean() + gamma * factor * np.abs(theta).sum())
        theta = theta - RATE * (gradients(theta, *RETAIN).mean(0) + gamma * factor * np.sign(theta))
    result = run("l1_sparse", epochs=4, l1_strength=gamma)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert [record.losses["retain"] for record in result.history] == pytest.approx(expected, abs=1e-5)
    assert result.passes == 80


def test_without_strength_it_is_fine_tuning():
    np.testing.assert_array_equal(weights(run("l1_sparse", l1_strength=0).model), weights(run("finetune").model))


def test_a_strong_penalty_leaves_smaller_weights():
    sums = [np.abs(weights(run("l1_sparse", epochs=20, l1_strength=gamma).model)).sum() for gamma in (0.0, 0.01, 0.1)]
    assert sums[0] > 1.03 * sums[1] > 1.5 * sums[2]
