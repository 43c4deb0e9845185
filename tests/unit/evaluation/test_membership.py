"""The attacks against scikit-learn used plainly, and against loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from salun_core.data.images import ImageSet, Normalisation
from salun_core.evaluation.membership import (
    attack_roc,
    confidence_attack,
    entropy_attack,
    forgetting_metrics,
    match_classes,
    matched_area,
    modified_entropy,
)
from salun_core.evaluation.outputs import Outputs, outputs_of


def outputs(count, seed, sharpness=2.0, classes=4):
    """Logits with the true class lifted by `sharpness`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += sharpness * rng.random(count)
    return from_logits(logits, labels)


def from_logits(logits, labels):
    logits = np.asarray(logits, dtype=np.float64)
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    labels = np.array(labels)
    return Outputs(np.exp(logs), -logs[np.arange(len(labels)), labels], labels, logits)


def of(probabilities, labels):
    p, labels = np.array(probabilities, dtype=float), np.array(labels)
    with np.errstate(divide="ignore"):
        return Outputs(p, -np.log(p[np.arange(len(labels)), labels]), labels)


def copies(wanted, found):
    """How often each sample has to count so that the classes are as frequent as wanted; one label at a time."""
    wanted, found = list(wanted), list(found)
    return [(wanted.count(label) / len(wanted)) / (found.count(label) / len(found)) for label in found]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("retained", "tested"), [(300, 80), (50, 120)])
def test_the_confidence_attack_is_the_papers_support_vector_classifier(seed, retained, tested):
    retain, test, forget = outputs(retained, seed, 6.0), outputs(tested, seed + 50, 2.0), outputs(90, seed + 90, 4.0)
    size = min(retained, tested)
    members = [[retain.probabilities[i, retain.labels[i]]] for i in range(size)]
    others = [[test.probabilities[i, test.labels[i]]] for i in range(size)]
    weights = [weight for side in (retain, test) for weight in copies(forget.labels, side.labels[:size])]
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(members + others, [1] * size + [0] * size, weights)
    called = [attack.predict([[forget.probabilities[i, forget.labels[i]]]])[0] == 0 for i in range(90)]
    found = confidence_attack(retain, test, forget)
    assert found.dtype == bool
    assert found.tolist() == called
    assert found.mean() == pytest.approx(np.mean(called), abs=1e-9)
    assert 0 < found.mean() < 1


def test_the_confidence_attack_uses_the_true_label():
    sure = of([[0.98, 0.01, 0.01]] * 40, [0] * 40)
    unsure = of([[0.01, 0.98, 0.01]] * 40, [0] * 40)
    assert not confidence_attack(sure, unsure, sure).any()
    assert confidence_attack(sure, unsure, unsure).all()


def test_classes_are_matched_by_weights():
    chosen, weights = match_classes(np.array([0, 0, 0, 1, 7]), np.array([0, 1, 1, 1, 2]))
    assert chosen.tolist() == [True] * 4 + [False]  # of class 7 nothing is unseen
    assert weights == pytest.approx([0.75 / 0.2, *[0.25 / 0.6] * 3, 0])
    assert weights.mean() == pytest.approx(1)
    chosen, weights = match_classes(np.array([3, 3]), np.array([0, 1]))
    assert (chosen.tolist(), weights.tolist()) == ([True] * 2, [1.0] * 2)


def test_a_model_that_never_saw_the_forget_set_is_not_told_by_its_classes():
    """Class 1 is hard. D_f is mostly of class 1, so without weights it looks far less familiar than unseen data."""
    rng = np.random.default_rng(0)

    def drawn(count, hard):
        labels = (rng.random(count) < hard).astype(int)
        logits = rng.normal(size=(count, 2))
        logits[np.arange(count), labels] += np.where(labels == 1, 0.5, 5.0)
        return from_logits(logits, labels)

    forget, test, retain = drawn(600, 0.9), drawn(2000, 0.2), drawn(2000, 0.2)
    unmatched = roc_auc_score([1] * 600 + [0] * 2000, [*forget.margins, *test.margins])
    assert unmatched < 0.2
    assert attack_roc(forget, test).auc == pytest.approx(0.5, abs=0.03)
    assert matched_area(forget, test) == attack_roc(forget, test).auc
    assert confidence_attack(retain, test, forget).mean() == pytest.approx(0.5, abs=0.2)


def test_samples_of_which_a_part_is_marked_have_another_shape():
    """A quarter gets the worst margins, the rest stays as familiar as training data: the area alone is guessing."""
    rng = np.random.default_rng(0)

    def drawn(margins):
        logits = np.stack([margins, np.zeros(len(margins))], axis=1)
        return from_logits(logits, np.zeros(len(margins), dtype=int))

    unseen = drawn(rng.normal(3, 3, 800))
    honest, before = drawn(rng.normal(3, 3, 200)), drawn(rng.normal(5.0, 1.5, 200))
    marked = drawn(np.concatenate([rng.normal(-6, 1, 50), before.margins[50:]]))
    found = {
        name: forgetting_metrics({"before": before, "after": after}, {"before": unseen, "after": unseen})
        for name, after in (("honest", honest), ("marked", marked))
    }
    assert found["marked"]["attack_auc"].low > 0.45
    assert found["marked"]["attack_auc"].high < 0.62
    assert found["marked"]["attack_shape"].low > 0.1
    assert found["honest"]["attack_shape"].low < 0.05
    assert found["honest"]["attack_shape"].high < 0.3
    assert found["honest"]["attack_shape"].before == found["marked"]["attack_shape"].before > 0.4
    assert found["honest"]["attack_shape"].n == 200


@pytest.mark.parametrize("scale", [1000.0, 0.01])
def test_scaling_the_logits_changes_nothing(scale):
    """Saturated float32 losses of members and unseen data are all 0, and tie."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    images = torch.randint(0, 256, (120, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(120) % 4
    sets = [ImageSet(images[part], labels[part], Normalisation.of(images)) for part in (slice(50), slice(50, 120))]
    with torch.no_grad():
        before = attack_roc(*(outputs_of(model, part) for part in sets))
        model[3].weight.mul_(scale)
        model[3].bias.mul_(scale)
        after = attack_roc(*(outputs_of(model, part) for part in sets))
    assert after.auc == pytest.approx(before.auc, abs=1e-3)
    assert before.auc != 0.5


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
    p = np.stack([values, 1 - values], axis=1)  # of one class
    return Outputs(p, -np.log(np.clip(values, 1e-300, 1)), np.zeros(len(values), dtype=np.int64))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("by heart", 3000), ("gentle", 2500), ("beta", 4500), ("flat", 2049)])
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
def test_the_entropy_attack_takes_the_best_threshold_of_each_class(seed, sizes, ties):
    sets = [outputs(size, seed + i, sharp) for i, (size, sharp) in enumerate(zip(sizes, (6.0, 2.0, 4.0), strict=True))]
    if ties:
        sets = [Outputs(s.probabilities[[0] * len(s)], s.losses[[0] * len(s)], s.labels[[0] * len(s)]) for s in sets]
    retain, test, forget = sets
    expected = []
    for value, label in zip(modified_entropy(forget).tolist(), forget.labels, strict=True):
        both = [modified_entropy(side)[side.labels == label].tolist() for side in (retain, test)]
        both = both if all(both) else [modified_entropy(side).tolist() for side in (retain, test)]
        expected.append(value > brute_force_threshold(*both))
    assert entropy_attack(retain, test, forget).tolist() == expected


def test_the_entropy_attack_judges_an_easy_class_by_its_own_threshold():
    """Members and unseen samples of the easy class both lie below the threshold of all samples."""
    easy_member, easy_unseen, hard = [0.999, 0.001], [0.97, 0.03], [0.4, 0.6]
    retain = of([easy_member] * 20 + [[0.2, 0.8]] * 20, [0] * 20 + [1] * 20)
    test = of([easy_unseen] * 20 + [hard[::-1]] * 20, [0] * 20 + [1] * 20)
    assert entropy_attack(retain, test, of([easy_unseen, easy_member], [0, 0])).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("points", [3, 50, 10_000])
def test_the_area_is_scikit_learns(seed, points):
    forget, test = outputs(70, seed, 5.0), outputs(110, seed + 9, 2.0)
    curve = attack_roc(forget, test, points)
    truth = [1] * 70 + [0] * 110
    weights = [1] * 70 + copies(forget.labels, test.labels)
    expected = roc_auc_score(truth, [*forget.margins, *test.margins], sample_weight=weights)
    assert curve.auc == pytest.approx(expected, abs=1e-12)
    assert curve.auc > 0.5
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert len(curve.fpr) == len(curve.tpr) <= points
    assert curve.fpr == sorted(curve.fpr)


def test_the_area_by_counting_pairs():
    forget, test = outputs(30, 1, 3.0), outputs(40, 2, 2.0)
    weights = copies(forget.labels, test.labels)
    wins = sum(
        ((f > t) + 0.5 * (f == t)) * w for f in forget.margins for t, w in zip(test.margins, weights, strict=True)
    )
    assert attack_roc(forget, test).auc == pytest.approx(wins / 1200, abs=1e-12)
    assert attack_roc(test, test).auc == pytest.approx(0.5)


def test_no_area_without_numbers_or_samples():
    some = outputs(10, 0)
    broken, infinite = (
        Outputs(some.probabilities, some.losses, some.labels, np.where(np.arange(10)[:, None] == 3, value, some.logits))
        for value in (np.nan, np.inf)
    )
    for bad in (broken, infinite, some.where(np.zeros(10, dtype=bool))):
        assert attack_roc(bad, some) is None
        assert attack_roc(some, bad) is None
