"""The linear probe on features whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.evaluation.probe import features_of, probe_metric, probe_scores
from salun_core.evaluation.statistics import rank_area


def images(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(torch.randn(count, 1, 4, 4, generator=generator) + shift, torch.zeros(count, dtype=torch.int64))


def test_features_are_what_the_last_linear_layer_gets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).train()
    batch = images(7, 1)
    by_hand = model[:3](batch.images).detach().double().numpy()
    assert features_of(model, batch, 3) == pytest.approx(by_hand, abs=1e-6)
    assert model.training
    assert features_of(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), batch) is None


def test_scores_come_from_folds_that_did_not_see_the_row():
    rng = np.random.default_rng(0)
    same = probe_scores(rng.normal(0, 1, (30, 40)), rng.normal(0, 1, (30, 40)), 0)
    assert rank_area(same[:30], same[30:]) < 0.75  # 40 features part 60 points fully where they were fitted on
    apart = probe_scores(rng.normal(2, 1, (30, 4)), rng.normal(0, 1, (30, 4)), 0)
    assert rank_area(apart[:30], apart[30:]) > 0.95


def test_the_metric_tells_models_apart():
    sees, blind = (nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 3)) for _ in range(2))
    nn.init.zeros_(blind[1].weight)
    metric = probe_metric({"before": sees, "after": blind}, images(40, 1, 0.8), images(40, 2), 0)
    assert metric.before > 0.9
    assert metric.after == 0.5
    assert (metric.low < 0.5 < metric.high, metric.n) == (True, 40)
    assert probe_metric({"before": sees, "after": blind}, images(4, 1), images(40, 2), 0).after is None
