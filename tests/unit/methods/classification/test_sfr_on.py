"""SFR-on: its weights, its mask and its steps by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.methods.classification.sfr_on import adaptive_ascent, fisher_diagonal
from salun_core.saliency.scores import scoring
from tests.support.by_hand import FORGET, RATE, RETAIN, gradients, linear, losses, run, weights


def fisher(theta, images, batch):
    rows = gradients(theta, *images)
    sums = [rows[first : first + batch].sum(0) for first in range(0, len(rows), batch)]
    return sum(square**2 for square in sums) / len(rows)


def adaptive_slope(theta, power):
    weight = losses(theta, *FORGET) ** -power
    return -np.tensordot(weight / weight.sum(), gradients(theta, *FORGET), 1)


@pytest.mark.parametrize("batch", [1, 6, 64])
def test_the_fisher_is_the_mean_square_of_gradients(batch):
    model = linear()
    with scoring(model):
        found = fisher_diagonal(model, ImageSet.of(RETAIN), batch)
    expected = fisher(weights(model), RETAIN, batch)
    np.testing.assert_allclose(found["1.weight"], expected[:, :-1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found["1.bias"], expected[:, -1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_samples_with_a_larger_loss_have_a_smaller_weight(power):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    single = nn.functional.cross_entropy(logits, labels, reduction="none").detach()
    expected = -float((single**-power / (single**-power).sum() * single).sum())
    assert float(adaptive_ascent(logits, labels, power).detach()) == pytest.approx(expected, rel=1e-6)
    if power == 0:
        assert expected == pytest.approx(-float(single.mean()), rel=1e-6)


def test_a_loss_of_zero_has_a_finite_weight():
    logits = torch.tensor([[1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = adaptive_ascent(logits, torch.tensor([0, 0]), 0.5)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_sample_without_gradient_does_not_stop_its_batch(power):
    """The first image is recognised with certainty: its float32 loss is 0, and 1 / (0 + 1e-15) was all of the sum."""
    images, labels = FORGET[0].clone(), FORGET[1]
    images[0] = 1e3 * linear()[1].weight.detach()[labels[0]].view(3, 2, 2)
    others = ImageSet.of((images[1:], labels[1:]))
    losses_of = nn.functional.cross_entropy(linear()(images), labels, reduction="none")
    assert float(losses_of[0].detach()) == 0
    assert float(losses_of[1:].min()) > 1e-3

    def slope(pixels, truth):
        model = linear()
        adaptive_ascent(model(pixels), truth, power).backward()
        return model[1].weight.grad

    torch.testing.assert_close(slope(images, labels), slope(others.images, others.labels))


def test_a_batch_without_any_gradient_changes_nothing():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = adaptive_ascent(logits, torch.tensor([0, 1]), 0.5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits.grad, torch.zeros(2, 2))


@pytest.mark.parametrize("slow", [1.0, 0.25])
def test_a_round_is_one_forget_step_then_retain_steps(slow):
    original = weights(linear())
    salient = fisher(original, FORGET, 64) >= 0.5 * fisher(original, RETAIN, 64)
    assert 0.1 < salient.mean() < 0.9
    theta = original
    for epoch in range(2):
        before, strength = theta, 0.7 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
        theta = theta - RATE * strength * salient * adaptive_slope(theta, 0.5)
        theta = theta - RATE * gradients(theta, *RETAIN).mean(0)
        theta = before + slow * (theta - before)
    result = run("sfr_on", epochs=2, forget_strength=0.7, saliency_ratio=0.5, slow_rate=slow)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert [list(record.losses) for record in result.history] == [["retain"]] * 2
    assert result.passes == 27 + 2 * 27


@pytest.mark.parametrize(("batch", "every"), [(4, 2), (4, 5), (6, 1), (3, 3)])
def test_a_forget_step_comes_before_each_group_of_retain_steps(batch, every):
    generator = torch.Generator().manual_seed(0)
    marked = torch.randn(7, 3, 2, 2, generator=generator) + 1000
    seen = []
    model = linear()
    model.register_forward_pre_hook(lambda module, args: seen.append(("f" if args[0].mean() > 100 else "r", args[0])))
    result = run("sfr_on", model, (marked, FORGET[1]), batch_size=batch, forget_every=every, forget_strength=1e-6)
    count = -(-20 // batch)
    mask = 1 + -(-7 // batch) + count  # the classes are counted, both sets are scored
    kinds = "".join(kind for kind, _ in seen[mask:])
    assert kinds == "".join(("f" if index % every == 0 else "") + "r" for index in range(count))
    assert sum(len(images) for _, images in seen[1:]) == result.passes
