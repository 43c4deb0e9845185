"""`SaliencyMask` against a reference that sorts everything."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salun_core.saliency import SaliencyMask
from salun_core.saliency.threshold import as_ordered, kth_largest

SPECIAL = [0.0, -0.0, 5e-324, 1e-45, 1.1754942e-38, 1e-38, 1.0, 1.0, 2.0, 65504.0, 3.0e38]
SHAPES = [(), (0,), (1,), (3,), (7,), (8,), (9,), (2, 3), (4, 1, 2), (17,), (0, 5), (33,)]


def reference_bits(scores, density):
    """Keep the first k of a stable descending sort of all magnitudes, joined in order."""
    flat = np.concatenate([score.to(torch.float64).abs().flatten().numpy() for score in scores.values()])
    k = max(1, round(density * flat.size))
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[:k]] = True
    cuts = np.cumsum([score.numel() for score in scores.values()])[:-1]
    parts = np.split(chosen, cuts)
    return {name: part.reshape(tuple(score.shape)) for (name, score), part in zip(scores.items(), parts, strict=True)}


@st.composite
def scores_of(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    if not sum(math.prod(shape) for shape in shapes):
        shapes.append((1,))
    value = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e3, 1e3), st.integers(-3, 3).map(float))
    scores = {}
    for index, shape in enumerate(shapes):
        size = math.prod(shape)
        flat = torch.tensor(draw(st.lists(value, min_size=size, max_size=size)), dtype=torch.float64)
        dtype = draw(st.sampled_from(dtypes))
        limit = torch.finfo(dtype).max
        scores[f"layer{index}.weight"] = flat.clamp(-limit, limit).to(dtype).reshape(shape)
    return scores


@settings(max_examples=300)
@given(scores=scores_of(), density=st.floats(1e-6, 1.0))
def test_mask_keeps_what_a_stable_sort_of_all_magnitudes_keeps(scores, density):
    mask = SaliencyMask.from_scores(scores, density)
    expected = reference_bits(scores, density)
    found = mask.tensors()
    assert list(found) == list(scores)
    for name, bits in expected.items():
        assert found[name].dtype == torch.bool
        assert found[name].shape == scores[name].shape
        assert np.array_equal(found[name].numpy(), bits), name
    assert mask.k == sum(int(bits.sum()) for bits in expected.values())
    assert mask.density == mask.k / mask.weights


@given(scores=scores_of(dtypes=(torch.float32,)), density=st.floats(1e-6, 1.0), data=st.data())
def test_sign_and_memory_layout_do_not_matter(scores, density, data):
    mask = SaliencyMask.from_scores(scores, density)
    flipped = {name: torch.where(torch.rand(score.shape) < 0.5, -score, score) for name, score in scores.items()}
    strided = {
        name: score.t().contiguous().t() if score.ndim == 2 else torch.stack([score, score], -1)[..., 0]
        for name, score in scores.items()
    }
    assert SaliencyMask.from_scores(flipped, density) == mask
    assert SaliencyMask.from_scores(strided, density) == mask


@given(scores=scores_of(dtypes=(torch.float32, torch.bfloat16)), densities=st.lists(st.floats(1e-6, 1.0), min_size=2))
def test_masks_of_one_pass_are_nested(scores, densities):
    masks = [SaliencyMask.from_scores(scores, density) for density in sorted(densities)]
    for small, large in zip(masks, masks[1:], strict=False):
        assert all(bool((large.tensor(name) | ~small.tensor(name)).all()) for name in scores)


@settings(max_examples=200)
@given(scores=scores_of(dtypes=(torch.float32,)), data=st.data())
def test_kth_largest_counts_the_ties_that_belong(scores, data):
    ordered = [as_ordered(score) for score in scores.values()]
    everything = np.sort(np.concatenate([values.numpy() for values in ordered]))[::-1]
    k = data.draw(st.integers(1, everything.size))
    value, ties = kth_largest(ordered, k)
    assert value == everything[k - 1]
    assert ties == int((everything[:k] == value).sum())


@given(
    left=st.floats(width=64, allow_nan=False, allow_infinity=False),
    right=st.floats(width=64, allow_nan=False, allow_infinity=False),
)
def test_the_integers_order_as_the_magnitudes_do(left, right):
    a, b = as_ordered(torch.tensor([left, right], dtype=torch.float64)).tolist()
    assert (a < b) == (abs(left) < abs(right))
    assert (a == b) == (abs(left) == abs(right))


def test_a_large_mask_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.randn(300, 700, generator=generator),
        "b": torch.zeros(5000),
        "c": torch.randint(0, 4, (90_000,), generator=generator).float(),
        "d": torch.randn(64, 32, 3, 3, generator=generator).mul_(1e-20),
    }
    for density in (1e-7, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0):
        mask, expected = SaliencyMask.from_scores(scores, density), reference_bits(scores, density)
        assert all(np.array_equal(mask.tensor(name).numpy(), expected[name]) for name in scores), density


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_scores_equal_keeps_the_lowest_indices(dtype):
    mask = SaliencyMask.from_scores({"a": torch.ones(10, dtype=dtype), "b": torch.ones(10, dtype=dtype)}, 0.6)
    assert mask.tensor("a").tolist() == [True] * 10
    assert mask.tensor("b").tolist() == [True] * 2 + [False] * 8


@given(
    shapes=st.lists(st.sampled_from(SHAPES[2:]), min_size=1, max_size=5),
    density=st.floats(1e-6, 1.0),
    seed=st.integers(0, 2**40),
)
def test_random_mask_has_exactly_k_bits_and_a_seed(shapes, density, seed):
    shapes = [*shapes, (1,)]
    named = {str(index): shape for index, shape in enumerate(shapes)}
    mask = SaliencyMask.random(named, density, seed)
    total = sum(math.prod(shape) for shape in shapes)
    assert sum(int(bits.sum()) for bits in mask.tensors().values()) == mask.k == max(1, round(density * total))
    assert mask == SaliencyMask.random({name: torch.empty(shape) for name, shape in named.items()}, density, seed)
    for name, share in mask.density_by_parameter().items():
        assert share == int(mask.tensor(name).sum()) / max(1, mask.tensor(name).numel())


def test_random_mask_draws_every_weight_equally_often():
    shapes, trials, density = {"a": (9,), "b": (4, 5), "c": ()}, 3000, 0.3
    counts = np.zeros(30)
    pairs = 0
    for seed in range(trials):
        mask = SaliencyMask.random(shapes, density, seed)
        flat = np.concatenate([bits.flatten().numpy() for bits in mask.tensors().values()])
        counts += flat
        pairs += int(flat[0] and flat[1])
    expected = trials * 9 / 30
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 60  # 29 degrees of freedom: p < 1e-3
    assert abs(pairs / trials - (9 * 8) / (30 * 29)) < 0.03
