"""Influence unlearning against a dense inverse."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import ModelError
from salun_core.methods.classification.influence import inverse_product
from salun_core.saliency.scores import scoring
from tests.support.by_hand import FORGET, RETAIN, gradients, linear, pair, run, weights


def removal(theta, forget=FORGET, retain=RETAIN):
    total = len(forget[1]) + len(retain[1])
    return len(forget[1]) / total * (gradients(theta, *forget).mean(0) - gradients(theta, *retain).mean(0)).ravel()


def dense(theta, retain, damping):
    rows = gradients(theta, *retain).reshape(len(retain[1]), -1)
    return damping * np.eye(theta.size) + rows.T @ rows / len(rows)


@pytest.mark.parametrize("damping", [1.0, 0.1])
def test_many_sweeps_give_the_product_with_the_dense_inverse(damping):
    theta = weights(linear())
    step = np.linalg.solve(dense(theta, RETAIN, damping), removal(theta)).reshape(theta.shape)
    result = run(
        "influence", influence_strength=2.0, influence_damping=damping, influence_sweeps=40, influence_samples=1000
    )
    np.testing.assert_allclose(weights(result.model) - theta, 2.0 * step, atol=2e-6)
    assert np.abs(step.ravel() - removal(theta) / damping).max() > 100 * 2e-6  # the matrix matters
    assert result.history == []
    assert result.passes == 27 + 40 * 20


def test_one_sweep_is_exact_for_one_image_and_a_step_of_the_recursion_for_more():
    theta = weights(linear())
    for count in (1, 5):
        retain = (RETAIN[0][:count], RETAIN[1][:count])
        product = removal(theta, retain=retain)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        rows = gradients(theta, *retain).reshape(count, -1)[order.numpy()]
        for row in rows:
            product = product - row * (row @ product) / (count + row @ row)
        result = run("influence", retain=retain, influence_strength=1.0)
        np.testing.assert_allclose((weights(result.model) - theta).ravel(), product, atol=2e-6)
        if count == 1:
            exact = np.linalg.solve(dense(theta, retain, 1.0), removal(theta, retain=retain))
            np.testing.assert_allclose(product, exact, atol=1e-9)


def test_orthogonal_gradients_need_one_sweep():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    images = ImageSet.of((torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])))
    with scoring(model):
        vectors = [[torch.ones(2, 4)], [torch.ones(2, 4)]]
        one, many = (
            inverse_product(model, images, vector, damping=0.5, sweeps=sweeps)
            for vector, sweeps in zip(vectors, (1, 20), strict=True)
        )
    torch.testing.assert_close(one, many)


def test_the_seed_draws_the_images_of_the_fisher():
    settings = {"influence_samples": 4, "influence_strength": 5.0}
    first, again, other = (weights(run("influence", seed=seed, **settings).model) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0
    assert run("influence", **settings).passes == 27 + 4


def test_the_forget_loss_rises_more_than_the_retain_loss():
    from tests.support.by_hand import losses

    forget, retain = pair(6, 3), pair(60, 4)
    theta = weights(
        run("finetune", retain=(torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]])), epochs=200).model
    )
    model = linear()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(theta[:, :-1]))
        model[1].bias.copy_(torch.tensor(theta[:, -1]))
    after = weights(run("influence", model, forget, retain, influence_strength=3.0).model)
    climbed = [losses(after, *images).mean() - losses(theta, *images).mean() for images in (forget, retain)]
    assert climbed[0] > 0.05
    assert climbed[0] > 5 * climbed[1]


def test_gradients_that_are_not_finite_are_refused():
    images = FORGET[0].clone()
    images[0] = float("nan")
    with pytest.raises(ModelError, match="influence is not finite"):
        run("influence", forget=(images, FORGET[1]))
