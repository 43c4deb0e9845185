"""The soft threshold against numpy's partition, and when it is applied."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.methods.classification.salun_soft import shrink
from tests.support.by_hand import FORGET, RATE, RETAIN, gradients, image_set, linear, net, run, weights


def soft(moved, share):
    """Threshold as sorting gives it."""
    back = round(share * moved.size)
    if not back:
        return moved
    threshold = np.partition(np.abs(moved).ravel(), back - 1)[back - 1]
    return np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrinking_equals_numpy_over_all_weights_at_once(share, dtype):
    before = net().to(dtype).to(memory_format=torch.channels_last)
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.1)
    moved = (flat(after) - flat(before)).numpy()
    shrink(after, before, share)
    expected = soft(moved, share)
    np.testing.assert_allclose((flat(after) - flat(before)).numpy(), expected, atol=1e-6)
    returned = expected == 0
    assert int(returned.sum()) == round(share * moved.size)
    assert torch.equal(flat(after)[returned], flat(before)[returned])  # the very bits


def test_ties_return_to_the_original_together():
    before, after = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        before.weight.zero_()
        after.weight.copy_(torch.tensor([[1.0, -1.0, 3.0, -5.0]]))
    shrink(after, before, 0.25)
    assert after.weight.tolist() == [[0.0, 0.0, 2.0, -4.0]]


def test_the_threshold_applies_after_every_step_and_falls_to_zero():
    original = weights(linear(2))
    wrong = (FORGET[0], 1 - FORGET[1].clamp(max=1))
    forget, retain = (FORGET[0], FORGET[1].clamp(max=1)), (RETAIN[0], RETAIN[1].clamp(max=1))
    theta = original
    for step, images in enumerate([wrong, retain, wrong, retain], 1):
        theta = theta - RATE * gradients(theta, *images).mean(0)
        theta = original + soft(theta - original, 0.6 * (1 - step / 4))
    result = run("salun_soft", linear(2), forget, retain, epochs=2, soft_density=0.4)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert result.passes == 54
    assert result.changed_fraction > 0.9


def test_full_density_is_random_labelling():
    found = [
        run(method, net(), image_set(9, 1), image_set(20, 2), batch_size=8, **own)
        for method, own in (("salun_soft", {"soft_density": 1.0}), ("random_label", {}))
    ]
    assert torch.equal(flat(found[0].model), flat(found[1].model))
