"""Boundary expanding: the class that is added, and that nothing of it is left."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import ModelError
from salun_core.methods.classification import UnlearnConfig, boundary_expanding
from salun_core.methods.classification.method import ClassifierContext
from tests.support.by_hand import FORGET, RATE, gradients, image_set, linear, net, run, weights


def context_of(model, classes=3, forget=FORGET, **config):
    forget = ImageSet.of(forget)
    return ClassifierContext(forget, forget, classes, UnlearnConfig(**config), model)


def test_the_forget_set_is_trained_towards_the_new_class_only():
    expanded = linear()
    boundary_expanding.begin(context_of(expanded))
    theta = weights(expanded)
    assert theta.shape == (4, 13)
    np.testing.assert_array_equal(theta[:3], weights(linear()))
    assert np.abs(theta[3]).max() <= 12**-0.5
    for _ in range(2):
        theta = theta - RATE * gradients(theta, FORGET[0], torch.full((7,), 3)).mean(0)
    result = run("boundary_expanding", epochs=2)
    np.testing.assert_allclose(weights(result.model), theta[:3], atol=2e-6)
    assert result.passes == 14


def test_the_result_has_the_names_and_shapes_of_the_original():
    model = net()
    result = run("boundary_expanding", model, image_set(9, 1), image_set(9, 2), batch_size=4)
    shapes = [{name: tuple(v.shape) for name, v in m.state_dict().items()} for m in (model, result.model)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])
    assert result.model.head.out_features == 4
    assert result.model(torch.zeros(2, 3, 9, 9)).shape == (2, 4)
    assert all(parameter.requires_grad for parameter in result.model.parameters())


@pytest.mark.parametrize("name", ["torchvision:vgg11", "torchvision:swin_t", "timm:vit_tiny_patch16_224", "resnet20"])
def test_heads_of_real_architectures_are_found(name):
    from salun_core.models.architectures import build_classifier

    with torch.device("meta"):
        model = build_classifier(name, 10, 3, 32 if name.startswith("timm") else None)
    head = boundary_expanding.last_linear(model, 10)
    assert head is [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def test_a_layer_without_bias_is_expanded_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
    boundary_expanding.begin(context_of(model))
    assert model[1].weight.shape == (4, 12)
    boundary_expanding.finish(model, 3)
    assert model[1].weight.shape == (3, 12)
    assert model[1].bias is None


def test_the_new_row_depends_on_the_seed():
    rows = []
    for seed in (0, 0, 1):
        model = linear()
        boundary_expanding.begin(context_of(model, seed=seed))
        rows.append(model[1].weight[-1].detach())
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_models_without_such_a_layer_are_refused():
    convolution = nn.Sequential(nn.Conv2d(3, 3, 2), nn.Flatten())
    with pytest.raises(ModelError, match="no layer to expand"):
        run("boundary_expanding", convolution)
    for rest in (nn.AdaptiveMaxPool1d(3), nn.Linear(3, 2)):
        inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), rest)
        labels = FORGET[1].clamp(max=1)
        with pytest.raises(ModelError, match="does not compute its logits"):
            boundary_expanding.begin(context_of(inner, forget=(FORGET[0], labels)))
