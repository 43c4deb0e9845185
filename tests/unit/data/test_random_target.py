"""A random share of the training split: reproducible, and kept when the request is redacted."""

import pytest

from salun_core.data import DataSpec, load_data, resolve_forget
from salun_core.data.targets import RandomTarget, parse_target, redact
from salun_core.errors import UsageError
from salun_core.tasks import TASKS, resolve_targets

PINNED = ["img-0", "img-10", "img-13", "img-17", "img-8"]


@pytest.fixture(scope="module")
def data():
    return load_data(DataSpec(source="digits"))


def test_a_share_of_the_training_split_is_drawn_by_its_seed(data):
    found = resolve_forget([RandomTarget(fraction=0.1, seed=1)], data.table, data.split)
    assert len(found.ids) == round(0.1 * len(data.split.train))
    assert set(found.ids) <= data.split.train.keys()
    assert found.kinds == ["samples"]  # so that the policy's rules for samples hold
    assert resolve_forget([RandomTarget(fraction=0.1, seed=1)], data.table, data.split) == found
    assert resolve_forget([RandomTarget(fraction=0.1, seed=2)], data.table, data.split).ids != found.ids
    left = redact(RandomTarget(fraction=0.1, seed=1), "0" * 32)
    assert (left.hashes, resolve_forget([left], data.table, data.split)) == ([], found)


def test_the_draw_is_pinned_and_independent_of_the_order_of_the_ids():
    names = [f"img-{number}" for number in range(20)]
    assert RandomTarget(fraction=0.25, seed=3).draw(names) == RandomTarget(fraction=0.25, seed=3).draw(names[::-1])
    assert RandomTarget(fraction=0.25, seed=3).draw(names) == PINNED
    assert RandomTarget(fraction=0.001).draw(names) == RandomTarget(fraction=0.05).draw(names)  # at least one
    rest = [name for name in names if name != PINNED[0]]
    assert set(PINNED[1:]) < set(RandomTarget(fraction=5 / 19, seed=3).draw(rest))


@pytest.mark.parametrize("fields", [{}, {"fraction": 0}, {"fraction": 1}, {"fraction": 0.1, "seed": -1}])
def test_a_fraction_is_a_share(fields):
    with pytest.raises(UsageError, match="fraction|seed"):
        parse_target({"kind": "random", **fields}, "x")


def test_a_diffusion_model_forgets_no_random_samples(data):
    with pytest.raises(UsageError, match="classes and concepts"):
        resolve_targets(TASKS["diffusion"], [RandomTarget(fraction=0.1)], data.table, data.split)
