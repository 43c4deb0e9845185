import json
import struct

import pytest
import torch

from salun_core.errors import ModelError, StoreError, UsageError
from salun_core.saliency import SaliencyMask
from salun_core.saliency.threshold import as_ordered

SCORES = {"a": torch.tensor([[0.1, -0.9], [0.5, 0.0]]), "b": torch.tensor([0.7])}


def test_a_mask_by_hand():
    mask = SaliencyMask.from_scores(SCORES, 0.6)
    assert mask.tensor("a").tolist() == [[False, True], [True, False]]
    assert mask.tensor("b").tolist() == [True]
    assert (mask.k, mask.weights, mask.density) == (3, 5, 0.6)
    assert mask.density_by_parameter() == {"a": 0.5, "b": 1.0}
    assert float(mask.facts["threshold"]) == 0.5
    assert "weights" in repr(mask)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_densities_outside_the_range_are_refused(density):
    for make in (
        lambda: SaliencyMask.from_scores(SCORES, density),
        lambda: SaliencyMask.random(SCORES, density, 0),
    ):
        with pytest.raises(UsageError, match="outside"):
            make()


def test_the_smallest_density_keeps_one_weight():
    assert SaliencyMask.from_scores(SCORES, 1e-9).tensor("a").tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(ModelError, match="score of b"):
        SaliencyMask.from_scores({**SCORES, "b": torch.tensor([value])}, 0.5)


@pytest.mark.parametrize("scores", [{}, {"a": torch.empty(0)}])
def test_no_weights_are_refused(scores):
    with pytest.raises(ModelError, match="no weights"):
        SaliencyMask.from_scores(scores, 0.5)
    with pytest.raises(ModelError, match="no weights"):
        SaliencyMask.random(scores, 0.5, 0)


def test_the_digest_covers_names_shapes_and_bits_only():
    mask = SaliencyMask.from_scores(SCORES, 0.6)
    assert mask.digest == SaliencyMask.from_scores({k: v.double() * 3 for k, v in SCORES.items()}, 0.6).digest
    assert mask.digest == mask.with_facts({"model_digest": "x"}).digest
    assert mask.digest == SaliencyMask.from_scores(dict(reversed(SCORES.items())), 0.6).digest
    assert hash(mask) == hash(mask.with_facts({"note": "x"}))
    others = [
        SaliencyMask.from_scores(SCORES, 0.8),
        SaliencyMask.from_scores({"a": SCORES["a"].flatten(), "b": SCORES["b"]}, 0.6),
        SaliencyMask.from_scores({"a": SCORES["a"], "c": SCORES["b"]}, 0.6),
    ]
    assert all(other != mask for other in others)
    assert mask != "a mask"


def test_a_full_mask_equals_density_one():
    full = SaliencyMask.full({name: score.shape for name, score in SCORES.items()})
    assert full == SaliencyMask.from_scores(SCORES, 1.0)
    assert full.density == 1.0


def test_seeds_differ():
    shapes = {"w": (1000,)}
    assert SaliencyMask.random(shapes, 0.5, 1) != SaliencyMask.random(shapes, 0.5, 2)


def test_a_file_takes_about_one_bit_a_weight(tmp_path):
    mask = SaliencyMask.random({f"layer{i}.weight": (64, 64, 3, 3) for i in range(30)}, 0.5, 0)
    path = tmp_path / "deep" / "er" / "mask.safetensors"
    mask.save(path)
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    assert (len(data) - 8 - header) * 8 <= 1.0 * mask.weights + 8 * len(mask.shapes)
    assert len(data) * 8 <= 1.1 * mask.weights
    metadata = json.loads(data[8 : 8 + header])["__metadata__"]
    assert {"format", "density", "k", "scores", "shapes", "digest"} <= metadata.keys()
    assert [item.name for item in path.parent.iterdir()] == ["mask.safetensors"]


def test_saving_is_atomic(tmp_path):
    path = tmp_path / "mask.safetensors"
    SaliencyMask.from_scores(SCORES, 0.2).save(path)
    SaliencyMask.from_scores(SCORES, 0.8).save(path)
    assert SaliencyMask.load(path).k == 4
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        SaliencyMask.from_scores(SCORES, 0.8).save(tmp_path / "folder")
    with pytest.raises(StoreError, match="cannot write"):
        SaliencyMask.from_scores(SCORES, 0.8).save(path / "below")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "mask.safetensors"]


def test_a_mask_that_does_not_fit_names_the_parameters():
    mask = SaliencyMask.from_scores(SCORES, 0.6)
    mask.check_fits({"a": (2, 2), "b": (1,)})
    for shapes, named in [
        ({"a": (2, 2)}, "b"),
        ({"a": (2, 2), "b": (1,), "c": (1,)}, "c"),
        ({"a": (4,), "b": (1,)}, "a"),
    ]:
        with pytest.raises(ModelError, match=f"differ: {named}"):
            mask.check_fits(shapes)


def test_scores_without_a_sign_are_not_copied():
    scores, signed = torch.rand(3, 4), torch.tensor([-0.0, 1.0])
    assert as_ordered(scores).data_ptr() == scores.data_ptr()
    assert as_ordered(signed).tolist() == as_ordered(signed.abs()).tolist()
    assert signed.signbit().tolist() == [True, False]
