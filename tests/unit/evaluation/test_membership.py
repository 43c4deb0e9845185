"""The attacks against scikit-learn used plainly, and against loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from salun_core.evaluation.membership import attack_roc, confidence_attack, entropy_attack, modified_entropy
from salun_core.evaluation.outputs import Outputs


def outputs(count, seed, sharpness=2.0, classes=4):
    """Logits with the true class lifted by `sharpness`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += sharpness * rng.random(count)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Outputs(p, -np.log(p[np.arange(count), labels]), labels)


def of(probabilities, labels):
    p, labels = np.array(probabilities, dtype=float), np.array(labels)
    with np.errstate(divide="ignore"):
        return Outputs(p, -np.log(p[np.arange(len(labels)), labels]), labels)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("retained", "tested"), [(300, 80), (50, 120)])
def test_the_confidence_attack_is_the_papers_support_vector_classifier(seed, retained, tested):
    retain, test, forget = outputs(retained, seed, 6.0), outputs(tested, seed + 50, 2.0), outputs(90, seed + 90, 4.0)
    size = min(retained, tested)
    members = [[retain.probabilities[i, retain.labels[i]]] for i in range(size)]
    others = [[test.probabilities[i, test.labels[i]]] for i in range(size)]
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(members + others, [1] * size + [0] * size)
    called = [attack.predict([[forget.probabilities[i, forget.labels[i]]]])[0] == 0 for i in range(90)]
    found = confidence_attack(retain, test, forget)
    assert found.dtype == bool
    assert found.tolist() == called
    assert found.mean() == pytest.approx(np.mean(called), abs=1e-9)
    assert 0 < found.mean() < 1


def test_the_confidence_attack_uses_the_true_label():
    sure = of([[0.98, 0.01, 0.01]] * 40, [0] * 40)
    unsure = of([[0.98, 0.01, 0.01]] * 40, [1] * 40)
    assert not confidence_attack(sure, unsure, sure).any()
    assert confidence_attack(sure, unsure, unsure).all()


def simulated(count, rng, kind, member):
    """Confidences of the true class: of a model that knows its data by heart, of a gentle one, and Beta draws."""
    if kind == "beta":
        return rng.beta(20, 0.3, count) if member else rng.beta(1.5, 0.7, count)
    if kind == "flat":
        return rng.beta(3, 2, count) if member else rng.beta(2, 2, count)
    middle, spread, wrong = {
        ("by heart", True): (13, 1.5, 0.0),
        ("by heart", False): (7, 3, 0.06),
        ("gentle", True): (6, 3, 0.03),
        ("gentle", False): (5.5, 3, 0.05),
    }[kind, member]
    lifted = rng.normal(middle, spread, count)
    lifted[rng.random(count) < wrong] -= 10
    return 1 / (1 + np.exp(-lifted))


def by_confidence(values):
    p = np.stack([values, 1 - values], axis=1)
    return Outputs(p, -np.log(np.clip(values, 1e-300, 1)), np.zeros(len(values), dtype=np.int64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"), [("by heart", 3000), ("gentle", 2500), ("beta", 4500), ("flat", 2049), ("flat", 4000)]
)
def test_many_samples_are_attacked_as_if_each_were_fitted(kind, size):
    rng = np.random.default_rng(size)
    members, others = simulated(size, rng, kind, True), simulated(size, rng, kind, False)
    asked = np.concatenate([simulated(1000, rng, kind, True), simulated(1000, rng, kind, False)])
    each = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate([members, others])[:, None], [1] * size + [0] * size)
    expected = each.predict(asked[:, None]) == 0
    found = confidence_attack(by_confidence(members), by_confidence(others), by_confidence(asked))
    assert 0 < expected.mean() < 1
    assert abs(100 * found.mean() - 100 * expected.mean()) <= 0.1
    assert (found != expected).mean() <= 0.001


def song_and_mittal(p, y):
    """Equation (8), one number at a time."""
    total = -(1 - p[y]) * math.log(p[y])
    for i, value in enumerate(p):
        if i != y:
            total -= value * math.log(1 - value)
    return total


def test_modified_entropy_is_song_and_mittals():
    some = outputs(200, 0)
    expected = [song_and_mittal(p, y) for p, y in zip(some.probabilities, some.labels, strict=True)]
    np.testing.assert_allclose(modified_entropy(some), expected, rtol=1e-12)


def test_modified_entropy_separates_confident_right_and_wrong_answers():
    p = [[0.98, 0.01, 0.01]] * 2
    right, wrong = modified_entropy(of(p, [0, 1]))
    assert right < 0.05
    assert wrong > 4  # the plain entropy of both is the same
    exact = modified_entropy(of([[1.0, 0.0], [1.0, 0.0]], [0, 1]))
    assert exact[0] == 0
    assert math.isfinite(exact[1])
    assert exact[1] > 60


def brute_force_threshold(members, others):
    """Of all observed values the one with the best balanced accuracy, the lowest on a tie."""
    best = None
    for candidate in sorted({*members, *others}):
        right = sum(m <= candidate for m in members) / len(members) + sum(o > candidate for o in others) / len(others)
        if best is None or right > best[0] + 1e-12:
            best = (right, candidate)
    return best[1]


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), sizes=st.tuples(*[st.integers(1, 40)] * 3), ties=st.booleans())
def test_the_entropy_attack_takes_the_best_threshold(seed, sizes, ties):
    sets = [outputs(size, seed + i, sharp) for i, (size, sharp) in enumerate(zip(sizes, (6.0, 2.0, 4.0), strict=True))]
    if ties:
        sets = [Outputs(s.probabilities[[0] * len(s)], s.losses[[0] * len(s)], s.labels[[0] * len(s)]) for s in sets]
    retain, test, forget = sets
    threshold = brute_force_threshold(modified_entropy(retain).tolist(), modified_entropy(test).tolist())
    expected = [value > threshold for value in modified_entropy(forget).tolist()]
    assert entropy_attack(retain, test, forget).tolist() == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("points", [3, 50, 10_000])
def test_the_area_is_scikit_learns(seed, points):
    forget, test = outputs(70, seed, 5.0), outputs(110, seed + 9, 2.0)
    curve = attack_roc(forget, test, points)
    truth = [1] * 70 + [0] * 110
    expected = roc_auc_score(truth, [-loss for loss in [*forget.losses, *test.losses]])
    assert curve.auc == pytest.approx(expected, abs=1e-12)
    assert curve.auc > 0.5
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert len(curve.fpr) == len(curve.tpr) <= points
    assert curve.fpr == sorted(curve.fpr)


def test_the_area_by_counting_pairs():
    forget, test = outputs(30, 1, 3.0), outputs(40, 2, 2.0)
    wins = sum((f < t) + 0.5 * (f == t) for f in forget.losses for t in test.losses)
    assert attack_roc(forget, test).auc == pytest.approx(wins / 1200, abs=1e-12)
    assert attack_roc(test, test).auc == pytest.approx(0.5)


def test_no_area_without_numbers_or_samples():
    some = outputs(10, 0)
    broken = Outputs(some.probabilities, np.where(np.arange(10) == 3, np.nan, some.losses), some.labels)
    infinite = Outputs(some.probabilities, np.where(np.arange(10) == 3, np.inf, some.losses), some.labels)
    for bad in (broken, infinite, some.where(np.zeros(10, dtype=bool))):
        assert attack_roc(bad, some) is None
        assert attack_roc(some, bad) is None
