"""CT: the kernels after the transposition, and the training that follows."""

import pytest
import torch
from torch import nn

from salun_core.errors import ModelError
from salun_core.methods.classification import unlearn
from salun_core.models.checkpoint import model_digest
from tests.support.by_hand import PLAIN, image_set, linear, net, run


def mirrored(model):
    """The model with rows and columns of its kernels exchanged, element by element."""
    kernel, turned = model.conv.weight.detach().clone(), model.conv.weight
    with torch.no_grad():
        for row in range(3):
            for column in range(3):
                turned[:, :, row, column] = kernel[:, :, column, row]
    return model


def test_it_fine_tunes_the_model_with_transposed_kernels():
    sets = {"forget": image_set(11, 1), "retain": image_set(30, 2)}
    settings = {"epochs": 2, "batch_size": 8, "batch_norm": "update", "learning_rate": 0.02, "schedule": "cosine"}
    config = {**PLAIN, **settings, "augment": True}
    found = unlearn(net(), "ct", **sets, config=config)
    expected = unlearn(mirrored(net()), "finetune", **sets, config=config)
    assert model_digest(found.model) == model_digest(expected.model)
    assert found.passes == 60


def test_the_kernels_are_exchanged_and_the_rest_is_kept():
    before, found = net(), run("ct", net(), image_set(8, 1), image_set(9, 2), learning_rate=1e-9).model
    torch.testing.assert_close(found.conv.weight, before.conv.weight.permute(0, 1, 3, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.head.weight, before.head.weight, atol=1e-6, rtol=0)


def test_kernels_that_are_not_square_keep_their_shape():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 2, (1, 3)), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(96, 4)
    model = nn.Sequential(*layers).eval()
    found = run("ct", model, image_set(8, 1), image_set(9, 2), learning_rate=1e-9).model
    torch.testing.assert_close(found[0].weight, model[0].weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1].weight, model[1].weight.transpose(2, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", [linear(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 3))])
def test_a_model_without_such_kernels_is_refused(model):
    with pytest.raises(ModelError, match="no kernel to transpose"):
        run("ct", model)
