"""What the search makes small, on losses whose distance is known."""

import numpy as np
import pytest
from scipy.stats import ks_2samp, mannwhitneyu, norm

from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.membership import confidence_attack
from salun_core.evaluation.outputs import Outputs
from salun_core.evaluation.statistics import average_gap, rank_area
from salun_core.tuning.objective import Reading, distance, figures_of, metrics_of


def outputs(losses, right, label=0):
    losses, right = np.array(losses, dtype=np.float64), np.array(right)
    rows = np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
    logits = np.stack([-losses, np.zeros(len(losses))], axis=1)  # the margin is minus the loss
    side = slice(None) if label == 0 else slice(None, None, -1)
    return Outputs(rows[:, side], losses, np.full(len(losses), label), logits[:, side])


def reading(forget, held_out, whole=False, retained=1.0):
    keep = np.arange(20) < 20 * retained
    return Reading(forget, outputs(np.ones(20), keep), held_out, np.full(len(forget), whole))


def spread(seed, n, scale=1.0):
    return np.random.default_rng(seed).exponential(scale, n)


def test_indistinguishable_is_zero():
    losses = spread(0, 40)
    same = outputs(losses, losses < 1)
    assert distance(reading(same, same), reading(same, same)) == 0


def test_single_samples_add_attack_two_sample_statistic_and_accuracy():
    forget, held_out = outputs(spread(1, 30, 0.3), np.arange(30) < 27), outputs(spread(2, 50), np.arange(50) < 40)
    after = reading(forget, held_out)
    area = mannwhitneyu(-forget.losses, -held_out.losses).statistic / (30 * 50)
    apart = ks_2samp(forget.losses, held_out.losses).statistic
    expected = ((abs(2 * area - 1) + apart) / 2 + abs(0.1 - 0.2)) / 4
    assert distance(after, after) == pytest.approx(expected)
    metrics = metrics_of(after, after)
    assert metrics["attack_auc"].after == pytest.approx(area)
    assert figures_of(metrics, after)["ks"] == pytest.approx(apart)


def test_a_whole_class_counts_by_its_accuracy_and_its_attack():
    held_out = outputs(spread(2, 50), np.ones(50, dtype=bool), label=1)
    after = reading(outputs(1 + spread(1, 30), np.arange(30) < 6), held_out, whole=True)
    area = mannwhitneyu(-after.forget.losses, -held_out.losses).statistic / (30 * 50)
    assert 0.05 < area < 0.45
    assert distance(after, after) == pytest.approx((0.2 + area) / 4)
    shares = {"UA", "UA_class", "UA_unseen", "RA", "TA"}
    assert set(metrics_of(after, after)) == shares | {
        *("attack_auc", "attack_shape", "effect", "change", "RA_loss", "TA_loss")
    }


def test_what_the_rest_lost_is_added_and_what_it_gained_is_not():
    same = outputs(spread(0, 40), np.ones(40, dtype=bool))
    full, less = reading(same, same), reading(same, same, retained=0.8)
    assert distance(full, less) == pytest.approx(0.2 / 4)
    assert distance(less, full) == 0


@pytest.mark.parametrize("gone", [True, False])
def test_held_out_accuracy_that_rises_counts_where_whole_classes_alone_are_forgotten(gone):
    low, high = (outputs(np.ones(50), np.arange(50) < right) for right in (30, 40))
    forget = outputs(np.ones(30), np.zeros(30, dtype=bool))
    before, after = reading(forget, low, whole=gone), reading(forget, high, whole=gone)
    less, more = (0, 0) if gone else (abs(1 - 0.4) / 4, abs(1 - 0.2) / 4)  # UA against the original's held-out errors
    attack = 0.5 / 4 if gone else 0  # all margins are equal, so that nothing is told apart
    assert distance(before, after) == pytest.approx(less + attack - (0.2 / 4 if gone else 0))
    assert distance(after, before) == pytest.approx(more + attack + 0.2 / 4)


def test_a_mixed_forget_set_takes_both_halves():
    held_out = outputs(spread(2, 50), np.ones(50, dtype=bool))
    forget = outputs(spread(1, 30), np.arange(30) < 15)
    mixed = Reading(forget, held_out, held_out, np.arange(30) < 10)
    metrics = metrics_of(mixed, mixed)
    assert (metrics["UA_class"].n, metrics["UA_samples"].n, metrics["attack_auc"].n) == (10, 20, 20)
    assert metrics["UA_class"].after == 0
    assert metrics["UA_samples"].after == pytest.approx(15 / 20)


def test_an_output_that_is_no_number_is_seen():
    good = outputs(spread(0, 5), np.ones(5, dtype=bool))
    bad = outputs([1.0, float("nan")], [True, False])
    assert reading(good, good).finite
    assert not reading(bad, good).finite


def test_held_out_data_count_in_the_mixture_of_the_forget_set():
    """Label 1 is hard. D_f is mostly of label 1, and neither set was trained on."""
    easy, hard = (lambda seed, n: spread(seed, n, 0.2)), (lambda seed, n: spread(seed, n, 3.0))

    def mixed(seed, easy_count, hard_count):
        parts = (
            outputs(easy(seed, easy_count), np.ones(easy_count, dtype=bool)),
            outputs(hard(seed + 1, hard_count), np.arange(hard_count) % 2 == 0, label=1),
        )
        return Outputs(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in ("probabilities", "losses", "labels")),
            np.concatenate([p.logits for p in parts]),
        )

    forget, held_out = mixed(1, 40, 360), mixed(3, 3600, 400)
    after = reading(forget, held_out)
    assert rank_area(forget.margins, held_out.margins) < 0.2
    assert after.attack_auc() == pytest.approx(0.5, abs=0.05)
    assert after.missed == pytest.approx(0.45, abs=0.01)
    assert after.apart() < 0.2
    assert distance(after, after) < 0.15


def model_of(retain, forget, held_out):
    """Return a reading whose margins are normal, from (mean, deviation) of each set."""

    def normal(mean, deviation, count):
        margins = norm.ppf((np.arange(count) + 0.5) / count, mean, deviation)
        right = 1 / (1 + np.exp(-margins))
        logits = np.stack([margins, np.zeros(count)], axis=1)
        return Outputs(np.stack([right, 1 - right], axis=1), -np.log(right), np.zeros(count, dtype=int), logits)

    sets = normal(*forget, 200), normal(*retain, 400), normal(*held_out, 400)
    return Reading(*sets, np.zeros(200, dtype=bool))


def reported_gap(after, reference):
    """Return the gap of the tables, which needs a retrained model."""

    def values(model):
        shares = {name: share.mean() for name, share in model.shares().items() if name in ("UA", "RA", "TA")}
        return shares | {"MIA": confidence_attack(model.retain, model.held_out, model.forget).mean()}

    wanted = values(reference)
    return average_gap(
        {
            name: Metric(before=None, after=float(value), reference=float(wanted[name]), n=1)
            for name, value in values(after).items()
        }
    )


def test_of_two_candidates_the_one_with_the_smaller_reported_gap_wins():
    """A candidate that forgets nothing against one that forgets a part and loses accuracy, as with BE.

    A sum in which RA and TA weighed as much as all of forgetting preferred the first.
    """
    original = model_of(retain=(3, 0.8), forget=(3, 0.8), held_out=(0, 3))
    retrained = model_of(retain=(3, 0.8), forget=(0, 3), held_out=(0, 3))
    unchanged, partial = original, model_of(retain=(1.7, 2), forget=(1, 2), held_out=(-1, 3))
    assert reported_gap(partial, retrained) < reported_gap(unchanged, retrained) - 0.05
    assert distance(original, partial) < distance(original, unchanged)
    for candidate in (partial, unchanged):
        assert distance(original, candidate) == pytest.approx(reported_gap(candidate, retrained), abs=0.02)


def test_a_candidate_that_is_wrong_everywhere_is_far():
    """Its errors on D_f are as many as its own on held-out data, but not as those of a retrained model."""
    original = model_of(retain=(3, 0.8), forget=(3, 0.8), held_out=(0, 3))
    broken = model_of(retain=(-3, 0.8), forget=(-3, 0.8), held_out=(-3, 0.8))
    assert distance(original, broken) == pytest.approx((0.5 + 0 + 1 + 0.5) / 4, abs=0.01)


@pytest.mark.parametrize("lost", ["RA", "TA", "UA"])
def test_each_accuracy_weighs_a_quarter_as_in_the_reported_gap(lost):
    same = outputs(np.ones(50), np.arange(50) < 40)
    worse = outputs(np.ones(50), np.arange(50) < 30)  # the same margins, so that the attack sees no difference
    sets = {"UA": same, "RA": same, "TA": same}
    before, after = (Reading(*found.values(), np.zeros(50, dtype=bool)) for found in (sets, sets | {lost: worse}))
    assert distance(before, after) == pytest.approx(0.2 / 4)
