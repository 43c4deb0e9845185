"""The restated behaviours differ from this library exactly where the page says so, and the page has the results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from lab.studies.deviations import theirs
from lab.studies.deviations.effects import Difference, best, differences
from lab.studies.deviations.influence import exact_product, gradients_of
from lab.studies.deviations.measures import MEASURES
from lab.studies.deviations.page import EFFECTS, PAGE, RESULT, filled
from lab.studies.deviations.weights import frozen_change, overlap
from salun_core.data import ImageSet
from salun_core.evaluation.membership import modified_entropy
from salun_core.evaluation.outputs import Outputs
from salun_core.methods.classification import method_config, unlearn
from salun_core.methods.classification.method import ClassifierContext, cross_entropy
from salun_core.saliency import SaliencyMask, saliency_scores


def toy(count=10, classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 4, 4, generator=generator)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=generator))


def linear(classes=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()


def context(**settings):
    config = method_config("random_label", {"epochs": 2, "batch_size": 4, "learning_rate": 0.1, **settings})
    return ClassifierContext(toy(), toy(12), 3, config)


def scores(model, size):
    ours = saliency_scores(model, toy().batches(size), cross_entropy)
    return ours, theirs.scores_by_batch(model, toy().batches(size))


def test_sums_of_batch_means_rank_differently_only_with_a_short_last_batch():
    model = linear()
    ours, restated = scores(model, 5)
    for name in ours:
        torch.testing.assert_close(restated[name], 2 * ours[name])
    ours, restated = scores(model, 4)
    ratio = restated["1.weight"] / ours["1.weight"]
    assert float(ratio.max() / ratio.min()) > 1.1
    assert all(weight.grad is None for weight in model.parameters())


def test_overlap_counts_bits():
    left = SaliencyMask.from_scores({"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 0.5)
    right = SaliencyMask.from_scores({"w": torch.tensor([4.0, 1.0, 2.0, 3.0])}, 0.5)
    assert overlap("x", left, right) == {"x: bits that differ": 0.5, "x: Jaccard": pytest.approx(1 / 3)}


def test_labels_of_all_classes_may_be_true_and_are_in_range():
    given = context()
    drawn = theirs.any_labels(given, torch.Generator().manual_seed(3))
    assert 0 < int((drawn == given.forget.labels).sum()) < len(drawn)
    assert set(drawn.tolist()) <= {0, 1, 2}


def test_a_mask_on_the_gradient_alone_lets_weight_decay_move_frozen_weights():
    model, given = linear(), context(weight_decay=0.01)
    mask = SaliencyMask.from_scores(scores(model, 4)[0], 0.5)
    loose = theirs.only_gradient_masked(model, given, mask)
    held = unlearn(model, "salun", forget=given.forget, retain=given.retain, config=given.config, mask=mask).model
    assert frozen_change(model, held, mask) == {"frozen that changed": 0.0, "relative change": 0.0}
    found = frozen_change(model, loose, mask)
    assert found["frozen that changed"] == 1.0
    assert 0 < found["relative change"] < 0.1
    still = theirs.only_gradient_masked(model, context(weight_decay=0.0), mask)
    assert frozen_change(model, still, mask)["frozen that changed"] == 0.0


def test_the_faulty_entropy_ignores_the_labels():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    right, wrong = (Outputs(p, np.zeros(2), np.array(labels)) for labels in ([0, 2], [1, 0]))
    np.testing.assert_array_equal(theirs.label_blind_entropy(right), theirs.label_blind_entropy(wrong))
    assert (modified_entropy(right) < modified_entropy(wrong)).all()
    by_hand = -(0.3 * np.log(0.7) + 0.8 * np.log(0.2) + 0.9 * np.log(0.1))
    assert theirs.label_blind_entropy(right)[0] == pytest.approx(by_hand)


def test_the_running_vector_corrects_along_the_first_gradient_only():
    model, vector = linear(), torch.randn(51, generator=torch.Generator().manual_seed(2)).double()
    rows = torch.stack(list(gradients_of(model, toy())))
    correction = theirs.one_running_vector(rows, vector, len(rows)) - vector
    along = (correction @ rows[0]) ** 2 / (correction @ correction) / (rows[0] @ rows[0])
    assert float(along) == pytest.approx(1)
    dense = torch.linalg.inv(torch.eye(51).double() + rows.T @ rows / len(rows)) @ vector
    torch.testing.assert_close(exact_product(rows, vector), dense)
    assert float((dense - vector) @ correction) ** 2 < 0.9 * float((dense - vector).norm() * correction.norm()) ** 2


def test_softening_by_epoch_leaves_weights_unchanged_that_ours_changes():
    model, given = linear(), context(order="mixed")
    config = method_config("salun_soft", given.config.model_dump() | {"soft_density": 0.5})
    made = theirs.trained(model, ClassifierContext(given.forget, given.retain, 3, config), theirs.softened_by_epoch)
    ours = unlearn(model, "salun_soft", forget=given.forget, retain=given.retain, config=config)
    left = sum(int((a == b).sum()) for a, b in zip(model.parameters(), made.parameters(), strict=True))
    assert left >= 51 // 8
    assert ours.changed_fraction > 1 - left / 51


def test_a_difference_is_seen_if_its_interval_excludes_zero():
    assert Difference(0, 0, [1.0, 1.2, 0.9]).seen
    assert not Difference(0, 0, [1.0, -1.2, 0.9]).seen
    assert not Difference(0, 0, [5.0]).seen
    assert not Difference(0, 0, [0.01, 0.01, 0.01]).seen
    assert Difference(0, 0, [1.0, 5.0, 3.0]).unclear
    assert not Difference(0, 0, [1.0, -5.0, 3.0]).unclear
    assert str(Difference(0, 0, [-1.0, -2.0])) == "−1.5 ± 0.7"


def test_each_side_counts_at_its_best_rate():
    def cell(gaps):
        return {name: gaps if name == "gap" else [0.5, 0.5] for name in ("UA", "RA", "TA", "MIA", "gap")}

    cells = {"ours salun 1": cell([0.3, 0.3]), "ours salun 2": cell([0.1, 0.2]), "theirs salun 1": cell([0.2, 0.3])}
    assert best(cells, "ours salun")[0] == "ours salun 2"
    assert differences(cells, "salun")["gap"].values == pytest.approx([10, 10])


def test_the_page_matches_the_results():
    text, document = PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text())
    assert set(document["deviations"]) == set(MEASURES) == set(EFFECTS)
    assert filled(text, document, quoted=False) == text
    assert document["seeds"] >= 3
    with pytest.raises(SystemExit, match="no marker"):
        filled(text.replace("<!-- split -->", ""), document)
