"""Bit-for-bit comparison of weights, on tensors whose bits are known."""

import copy
import math

import pytest
import torch
from torch import nn

from salun_core.errors import ModelError
from salun_core.evaluation.integrity import compare_weights, with_text_encoder
from salun_core.methods.classification import unlearn
from salun_core.saliency import SaliencyMask


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, -0.0, 1.0], [2.0, float("nan"), 3.0]]))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
        self.none = nn.Parameter(torch.empty(0, 2))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.tensor(3))


def test_weights_are_compared_bit_by_bit():
    before, after = Tiny(), Tiny()
    assert compare_weights(before, after).model_dump() == {
        "weights": 7,
        "weights_changed": 0,
        "frozen_changed": None,
        "non_finite": 1,
        "buffers_changed": 0,
    }
    assert compare_weights(before, after).distance is None  # a weight is NaN
    mask = SaliencyMask.from_scores(
        {"weight": torch.tensor([[5.0, 1.0, 5.0], [5.0, 1.0, 5.0]]), "scale": torch.tensor(0.0), "none": after.none},
        4 / 7,
    )
    with torch.no_grad():
        after.weight[0, 0] = -0.0  # salient; equal as a number, another bit
        after.weight[0, 1] = 0.0  # frozen
        after.scale += 0.01
        after.mean[2] = float("inf")
        after.count += 1
    found = compare_weights(before, after, mask)
    assert found.weights_changed == 3
    assert found.frozen_changed == 2
    assert found.non_finite == 2
    assert found.buffers_changed == 2


def test_memory_layout_is_ignored(lab):
    other = copy.deepcopy(lab.model).to(memory_format=torch.contiguous_format)
    assert compare_weights(lab.model, other).weights_changed == 0


def test_the_distance_leaves_out_a_factor_for_each_layer_and_all_biases():
    before, after = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1)), nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1))
    with torch.no_grad():
        before[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
        before[1].weight.copy_(torch.tensor([[0.0, 1.0]]))
        after[0].weight.copy_(torch.tensor([[-6.0, -8.0]]))
        after[1].weight.copy_(torch.tensor([[0.0, 7.0]]))
        assert compare_weights(before, after).distance == pytest.approx(0, abs=1e-7)
        after[1].weight.copy_(torch.tensor([[10.0, 7.0]]))
        assert compare_weights(before, after).distance == pytest.approx(10 / math.sqrt(100 + 49 + 100))
        after[0].weight.copy_(torch.tensor([[-4.0, 3.0]]))
        after[1].weight.copy_(torch.tensor([[5.0, 0.0]]))
        assert compare_weights(before, after).distance == pytest.approx(1)
        before[0].weight.zero_()
        assert compare_weights(before, after).distance == pytest.approx(1)
        for layer in after:
            layer.weight.zero_()
        assert compare_weights(before, after).distance is None


def test_a_retrained_model_is_far_from_the_one_before_although_their_seeds_are_equal(lab):
    """With the first weights of an equal seed it would be 0.3 away: after so few epochs they are still there."""
    forget, retain = lab.train.select(range(5)), lab.train.select(range(5, 300))
    config = {"epochs": 1, "batch_size": 64, "batch_norm": "update", "learning_rate": 0.05}
    again = unlearn(lab.model, "retrain", forget=forget, retain=retain, config=config).model
    assert compare_weights(lab.model, again).distance > 0.9


def test_models_that_cannot_be_compared_are_refused(lab):
    others = [nn.Linear(2, 2), copy.deepcopy(lab.model).double(), copy.deepcopy(lab.model)]
    others[2].register_buffer("more", torch.zeros(1))
    for other in others:
        with pytest.raises(ModelError, match="the two models differ"):
            compare_weights(lab.model, other)
    with pytest.raises(ModelError, match="does not fit"):
        compare_weights(lab.model, lab.model, SaliencyMask.full({"w": (2,)}))


def test_no_mask_covers_a_text_encoder_and_a_changed_one_hides_the_distance():
    torch.manual_seed(0)
    before, text = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2)
    after, trained = copy.deepcopy(before), copy.deepcopy(text)
    after.weight.data[0] += 1
    mask = SaliencyMask.full({"weight": (2, 3)}).within({"weight": (2, 3), "bias": (2,)})
    found = compare_weights(before, after, mask)
    same = with_text_encoder(found, text, trained)
    assert (same.weights, same.weights_changed, same.frozen_changed) == (8 + 10, 3, 0)
    assert same.distance == found.distance
    trained.bias.data[0] += 1
    other = with_text_encoder(found, text, trained)
    assert (other.weights_changed, other.frozen_changed, other.distance) == (4, 1, None)
    assert with_text_encoder(compare_weights(before, after), text, trained).frozen_changed is None
    trained.bias.data[1] = float("nan")
    assert with_text_encoder(found, text, trained).non_finite == 1
