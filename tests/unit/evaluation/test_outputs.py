"""Outputs and features of a classifier, against the model itself."""

import numpy as np
import torch
from torch import nn

from salun_core.evaluation.outputs import Outputs, outputs_of, penultimate_features


def test_outputs_are_those_of_eval_mode_and_modes_are_kept(lab, copy_of):
    copy_of.train()
    copy_of.bn1.eval()
    modes = [module.training for module in copy_of.modules()]
    statistics = copy_of.bn1.running_mean.clone()
    found = outputs_of(copy_of, lab.test, batch_size=100)
    assert [module.training for module in copy_of.modules()] == modes
    assert torch.equal(copy_of.bn1.running_mean, statistics)
    expected = outputs_of(lab.model, lab.test, batch_size=7)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    assert found.probabilities.dtype == np.float64
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(found.losses, -np.log(found.confidences), rtol=1e-6)
    assert len(outputs_of(lab.model, lab.test.select([]))) == 0


def test_predictions_and_what_is_right():
    p = np.array([[0.5, 0.5], [0.2, 0.8], [np.nan, np.nan], [0.9, 0.1]])
    some = Outputs(p, np.zeros(4), np.array([0, 0, 0, 0]))
    assert some.predictions[:2].tolist() == [0, 1]
    assert some.correct.tolist() == [True, False, False, True]
    assert some.where(np.array([1, 3])).confidences.tolist() == [0.2, 0.9]


def test_features_are_the_inputs_of_the_last_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).train()
    images = torch.randn(7, 1, 4, 4)
    torch.testing.assert_close(penultimate_features(model, images.split, 3), model[:3](images).detach())
    assert model.training
    assert penultimate_features(model, lambda size: []).shape == (0, 5)
    assert penultimate_features(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), images.split) is None
