"""Relearning: a model that only hides a class has it back at once, one that never saw it has not."""

import pytest
import torch

from salun_core.evaluation.outputs import outputs_of
from salun_core.evaluation.relearning import halves, relearn, relearn_metric
from salun_core.models.checkpoint import model_digest


def test_halves_are_disjoint_and_whole(lab):
    forget, _ = lab.parts("class")
    taught, asked = halves(forget, 3)
    assert set(taught.ids) | set(asked.ids) == set(forget.ids)
    assert not set(taught.ids) & set(asked.ids)
    assert 0 <= len(asked) - len(taught) <= 1
    assert halves(forget, 3)[0].ids == taught.ids != halves(forget, 4)[0].ids


def test_the_curve_begins_at_the_model_and_repeats(lab):
    model = lab.unlearn("class")
    taught, asked = halves(lab.parts("class")[0], 0)
    before = model_digest(model)
    points = relearn(model, taught, asked, 12, 0)
    assert model_digest(model) == before
    assert points[0].step == 0
    assert points[0].accuracy == outputs_of(model, asked).correct.mean()
    assert [point.step for point in points] == [0, 2, 4, 6, 8, 10, 12]
    assert relearn(model, taught, asked, 12, 0) == points
    assert points[-1].accuracy > 0.9 > 0.2 > points[0].accuracy  # it came back


def test_the_first_step_is_one_of_sgd(lab):
    model = lab.unlearn("class")
    taught, asked = halves(lab.parts("class")[0], 0)
    by_hand = lab.unlearn("class").requires_grad_(True).eval()
    images, labels = next(taught.batches(64, torch.Generator().manual_seed(0)))
    torch.nn.functional.cross_entropy(by_hand(images), labels).backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 0.003 * parameter.grad
    point = relearn(model, taught, asked, 1, 0)[-1]
    assert point.accuracy == pytest.approx(outputs_of(by_hand, asked).correct.mean(), abs=0.02)


def test_nothing_to_halve_is_no_metric():
    assert relearn_metric({}, 0).after is None
