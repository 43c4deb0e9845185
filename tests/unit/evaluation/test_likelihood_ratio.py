"""The likelihood-ratio attack on normal distributions whose answer is known, and on the digits."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import UsageError
from salun_core.evaluation.likelihood_ratio import (
    Shadows,
    assignments,
    caught_at,
    lira_metrics,
    logit_scaled,
    offline_scores,
    online_scores,
    train_shadows,
)
from salun_core.evaluation.outputs import Outputs
from salun_core.evaluation.statistics import rank_area

pytestmark = pytest.mark.slow


def drawn(shadows, samples, seed, gap):
    """Shadow models whose confidence on a sample is normal around its own difficulty, `gap` higher for members."""
    rng = np.random.default_rng(seed)
    inside = assignments(shadows, samples, seed)
    hard = rng.normal(0, 3, samples)
    return Shadows(hard + gap * inside + rng.normal(0, 1, (shadows, samples)), inside), hard, rng


@pytest.mark.parametrize("shadows", [4, 8, 64])
def test_each_sample_is_seen_by_half_of_the_models(shadows):
    inside = assignments(shadows, 37, 5)
    assert (inside.sum(axis=0) == shadows // 2).all()
    assert len({tuple(column) for column in inside.T}) > 1
    assert (inside == assignments(shadows, 37, 5)).all()


@pytest.mark.parametrize("shadows", [0, 2, 5])
def test_too_few_or_an_odd_number_are_refused(shadows):
    with pytest.raises(UsageError, match="shadow models"):
        assignments(shadows, 10, 0)


def test_online_scores_are_the_ratio_of_the_two_densities():
    shadows, hard, rng = drawn(64, 5, 1, 2.0)
    phi = hard + rng.normal(0, 1, 5)
    for index, score in enumerate(online_scores(phi, shadows)):
        inside = shadows.scaled[shadows.inside[:, index], index]
        outside = shadows.scaled[~shadows.inside[:, index], index]
        fits = [norm.logpdf(phi[index], values.mean(), values.std(ddof=1)) for values in (inside, outside)]
        assert score == pytest.approx(fits[0] - fits[1], abs=1e-6)


def test_few_models_share_one_variance():
    shadows, hard, _ = drawn(8, 50, 2, 1.0)
    outside = [shadows.scaled[~shadows.inside[:, i], i] for i in range(50)]
    deviation = np.sqrt(np.mean([values.var(ddof=1) for values in outside]))
    by_hand = [(hard[i] - outside[i].mean()) / deviation for i in range(50)]
    assert offline_scores(hard, shadows) == pytest.approx(by_hand, abs=1e-9)


def test_the_attack_reaches_the_best_possible_area_and_a_population_attack_does_not():
    shadows, hard, rng = drawn(128, 4000, 3, 2.0)
    member = np.arange(4000) < 2000
    phi = hard + 2.0 * member + rng.normal(0, 1, 4000)
    optimum = norm.cdf(2.0 / np.sqrt(2))  # two normals, 2 deviations apart
    for scores in (online_scores(phi, shadows), offline_scores(phi, shadows)):
        assert rank_area(scores[member], scores[~member]) == pytest.approx(optimum, abs=0.03)
    assert rank_area(phi[member], phi[~member]) < optimum - 0.2
    same = hard + rng.normal(0, 1, 4000)
    scores = online_scores(same, shadows)
    assert rank_area(scores[member], scores[~member]) == pytest.approx(0.5, abs=0.03)


def test_found_at_few_false_alarms():
    others = np.arange(200.0)  # two may be above
    assert caught_at(np.array([197.0, 197.5, 198.0, 300.0]), others) == 0.75
    assert caught_at(np.array([49.0, 50.0]), np.arange(50.0)) == 0.5  # none may


def test_logit_scaling_is_the_log_odds_and_finite_at_certainty():
    rows = np.array([[0.8, 0.15, 0.05], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = logit_scaled(Outputs(rows, np.zeros(3), np.array([0, 0, 0])))
    assert found[0] == pytest.approx(np.log(0.8 / 0.2))
    assert np.isfinite(found).all()
    assert found[1] > 50 > -50 > found[2]


def test_a_net_that_learnt_noise_by_heart_is_found_out(lab):
    """Labels at random can only be learnt by heart: members stand out, in the model that saw them alone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (48, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (48,), generator=generator)
    pool = ImageSet(noise, labels, lab.train.normalisation)
    retain = ImageSet(*(getattr(lab.train.select(range(64)), key) for key in ("images", "labels", "normalisation")))

    def train(images, seed):
        """A wide net, which learns a hundred images by heart in a moment."""
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        optimizer = torch.optim.Adam(net.parameters(), 0.003)
        for _ in range(100):
            for inputs, given in images.batches(len(images)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs), given).backward()
                optimizer.step()
        return net.eval()

    shadows = train_shadows(train, retain, pool, 4, 0)
    members = pool.select(range(24))
    seen, unseen = train(retain.joined(members), 77), train(retain, 78)
    found = lira_metrics({"before": seen, "after": unseen}, shadows, pool, 24)
    assert found["lira_auc"].before > 0.9 > 0.75 > found["lira_auc"].after
    assert found["lira_auc"].low < found["lira_auc"].after < found["lira_auc"].high
    assert found["lira_offline_auc"].before > 0.75
    assert found["lira_tpr"].n == 24
    again = train_shadows(train, retain, pool, 4, 0)
    assert np.array_equal(again.scaled, shadows.scaled)
