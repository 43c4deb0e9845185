"""MSG: the weights it draws afresh and its steps, against numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.errors import ModelError
from salun_core.methods.classification.msg import layers_of
from tests.support.by_hand import FORGET, RATE, RETAIN, gradients, image_set, linear, net, run, weights


def difference(model, seed=0):
    """g of the linear model, [K, 13]: gradients summed over a draw of D_r, minus those over D_f."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:7]
    theta = weights(model)
    return gradients(theta, RETAIN[0][order], RETAIN[1][order]).sum(0) - gradients(theta, *FORGET).sum(0)


def fresh_by_hand(shape, fan_out, seed=0):
    return np.sqrt(2 / fan_out) * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


def start_by_hand(share, seed=0):
    """Weights after the draw, and which of them were drawn; biases stay."""
    model = linear()
    theta, g = weights(model), difference(model, seed)[:, :12]
    chosen = np.zeros(36, bool)
    chosen[np.argsort(np.abs(g).ravel(), kind="stable")[: round(share * 36)]] = True
    chosen = chosen.reshape(3, 12)
    theta[:, :12] = np.where(chosen, fresh_by_hand((3, 12), 3, seed), theta[:, :12])
    return theta, np.hstack([chosen, np.ones((3, 1), bool)])


@pytest.mark.parametrize(("share", "kappa", "seed"), [(0.3, 0.1, 0), (0.8, 0.0, 0), (0.5, 1.0, 4)])
def test_the_weights_with_the_smallest_difference_are_drawn_afresh_and_the_others_follow_slowly(share, kappa, seed):
    theta, free = start_by_hand(share, seed)
    expected = []
    for _ in range(2):
        slope = gradients(theta, *RETAIN)
        expected.append(slope.mean(0))
        theta = theta - RATE * np.where(free, 1.0, kappa) * slope.mean(0)
    result = run("msg", epochs=2, reset_share=share, kept_gradient=kappa, seed=seed)
    np.testing.assert_allclose(weights(result.model), theta, atol=3e-6)
    assert [list(record.losses) for record in result.history] == [["retain"]] * 2
    assert result.passes == 7 + 7 + 2 * 20


def test_only_convolutions_are_reset_if_there_are_any():
    model = net()
    assert list(layers_of(model)) == ["conv.weight"]
    result = run("msg", model, image_set(11, 1), image_set(30, 2), learning_rate=1e-9, reset_share=0.25)
    before = model.conv.weight.detach()
    moved = (result.model.conv.weight - before).abs() > 1e-4
    assert int(moved.sum()) == round(0.25 * before.numel())
    spread = float(result.model.conv.weight.detach()[moved].std())
    assert spread == pytest.approx(np.sqrt(2 / (6 * 9)), rel=0.4)  # fan out: 6 filters of 9 pixels
    torch.testing.assert_close(result.model.head.weight, model.head.weight, atol=1e-6, rtol=0)


def test_frozen_layers_stay_and_a_model_without_layers_is_refused():
    model = net()
    model.conv.weight.requires_grad_(False)
    assert list(layers_of(model)) == ["head.weight"]
    with pytest.raises(ModelError, match="no layer to reset"):
        layers_of(nn.BatchNorm2d(3))
