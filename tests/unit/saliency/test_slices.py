"""The saliency of a forget set has the same bits however many processes score it."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from salun_core.errors import DataError, ModelError, UsageError
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency.scores import CHUNK, PartialSums, Slice, layout, repeatable, score_slice

SAMPLES = 5 * CHUNK - 100
WHOLE = Slice(0, 1)


class Net(nn.Module):
    """A convolution in channels-last layout, batch norm, a parameter that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last).train()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(SAMPLES, 2, 6, 6, generator=generator),
        torch.randint(0, 4, (SAMPLES,), generator=generator),
    )


def batches(data, part=WHOLE, samples=SAMPLES):
    chosen = part.samples(samples)
    images, labels = (values[chosen.start : chosen.stop] for values in data)
    return zip(images.split(CHUNK), labels.split(CHUNK), strict=True) if len(labels) else []


def part_of(model, data, index, count):
    part = Slice(index, count)
    return score_slice(model, batches(data, part), cross_entropy, SAMPLES, part)


@pytest.fixture(scope="module")
def alone(model, data):
    return saliency_scores(model, batches(data), cross_entropy)


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, score in found.items():
        assert torch.equal(score.view(torch.int32), expected[name].contiguous().view(torch.int32)), name


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_any_number_of_slices_gives_the_same_bits(model, data, alone, count):
    whole = PartialSums(SAMPLES)
    for index in reversed(range(count)):  # whichever comes first
        part = part_of(model, data, index, count)
        assert list(part.nodes) == layout(SAMPLES, Slice(index, count))
        for node, sums in part.nodes.items():
            whole.add(node, sums)
    scores = whole.scores()
    assert_same_bits(scores, alone)
    assert SaliencyMask.from_scores(scores, 0.3).digest == SaliencyMask.from_scores(alone, 0.3).digest
    assert float(scores["unused.weight"].abs().sum()) == 0


def random_sums(samples, seed):
    """One summand a chunk, of magnitudes so different that the order of adding shows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-samples // CHUNK), 24)
    return torch.randn(shape, generator=generator) * 10 ** torch.randint(0, 6, shape, generator=generator)


@given(st.integers(1, 40 * CHUNK), st.integers(1, 50), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_sum_depends_on_the_chunks_only(samples, count, seed, random):
    chunks = random_sums(samples, seed)
    alone = PartialSums(samples)
    for number, value in enumerate(chunks):
        alone.add((0, number), {"w": value.clone()})
    merged, covered = PartialSums(samples), []
    parts = []
    for index in range(count):
        part = PartialSums(samples)
        for number in Slice(index, count).chunks(samples):
            part.add((0, number), {"w": chunks[number].clone()})
            covered.append(number)
        assert list(part.nodes) == layout(samples, Slice(index, count))
        assert len(part.nodes) <= max(1, 2 * len(chunks).bit_length())
        parts += part.nodes.items()
    assert covered == list(range(len(chunks)))
    random.shuffle(parts)
    for node, sums in parts:
        merged.add(node, sums)
    expected, found = alone.scores()["w"], merged.scores()["w"]
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    exact = chunks.double().sum(dim=0).div(samples).abs()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6 * float(chunks.abs().sum() / samples))


def test_the_order_of_adding_does_matter():
    """Else the test above could not fail."""
    chunks = random_sums(16 * CHUNK, 3)
    tree = PartialSums(16 * CHUNK)
    for number, value in enumerate(chunks):
        tree.add((0, number), {"w": value.clone()})
    in_turn = list(itertools.accumulate(chunks))[-1].div(16 * CHUNK).abs()
    assert not torch.equal(tree.scores()["w"], in_turn)


@given(st.integers(1, 70), st.integers(0, 1000))
def test_the_sum_is_the_same_when_the_number_of_chunks_is_not_known_before(count, seed):
    chunks = random_sums(count * CHUNK, seed)
    known, unknown = PartialSums(count * CHUNK), PartialSums()
    for number, value in enumerate(chunks):
        known.add((0, number), {"w": value.clone()})
        unknown.add((0, number), {"w": value.clone()})
    unknown.samples = count * CHUNK
    assert torch.equal(known.scores()["w"].view(torch.int32), unknown.scores()["w"].view(torch.int32))


@pytest.mark.parametrize("size", [64, CHUNK, SAMPLES])
def test_other_batches_give_the_same_scores_but_for_rounding(model, data, alone, size):
    other = zip(data[0].split(size), data[1].split(size), strict=True)
    torch.testing.assert_close(saliency_scores(model, other, cross_entropy), alone)


def test_in_the_repeatable_context_the_number_of_threads_does_not_matter(model, data, alone):
    torch.set_num_threads(2)
    try:
        with repeatable():
            assert torch.get_num_threads() == 1
            assert_same_bits(saliency_scores(model, batches(data), cross_entropy), alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_scoring_leaves_the_number_of_threads_alone(model, data):
    torch.set_num_threads(2)
    seen = []

    def watched():
        for batch in batches(data):
            seen.append(torch.get_num_threads())
            yield batch

    try:
        saliency_scores(model, watched(), cross_entropy)
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {2}


def test_the_model_is_left_as_it_was(model, data):
    before = copy.deepcopy(model.state_dict())
    part_of(model, data, 1, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("short", "chunk 1 has 256 samples, its batch has 255"),
        ("long", "chunk 1 has 256 samples, its batch has 257"),
        ("missing", "chunk 2 has no batch"),
        ("more", "there are more batches than chunks"),
    ],
)
def test_batches_that_are_not_the_chunks_of_a_slice_are_refused_with_the_cause(model, data, change, why):
    part = Slice(0, 2)
    given = [*batches(data, part)]
    if change == "missing":
        given.pop()
    elif change == "more":
        given.append(given[0])
    else:
        size = CHUNK - 1 if change == "short" else CHUNK + 1
        given[0] = tuple(values[:size] for values in data)
    with pytest.raises(DataError, match=f"slice 1 of 2: {why}. To fix it: give the samples 0 to 512 of 1180"):
        score_slice(model, given, cross_entropy, SAMPLES, part)


def test_an_empty_forget_set_a_model_without_parameters_and_nan_are_refused(model, data):
    with pytest.raises(DataError, match="empty"):
        saliency_scores(model, [], cross_entropy)
    with pytest.raises(ModelError, match="no parameters"):
        saliency_scores(nn.Flatten(), [], cross_entropy)
    images = data[0].clone()
    images[7, 0, 2, 2] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        saliency_scores(model, batches((images, data[1])), cross_entropy)


def test_an_incomplete_sum_gives_no_scores(model, data):
    with pytest.raises(UsageError, match="not complete"):
        part_of(model, data, 0, 2).scores()
