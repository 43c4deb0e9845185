"""The saliency of a forget set has the same bits however many shards score it."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from salun_core.errors import DataError, IntegrityError, ModelError, UsageError
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency import scores as shards
from salun_core.saliency.scores import CHUNK, PartialSums, Shard, layout, repeatable, score_shard
from salun_core.saliency.shard_file import ShardHeader, merge_shards, read_shard, write_shard

SAMPLES = 5 * CHUNK - 100
MODEL, FORGET = "a" * 64, "b" * 64


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


def batches(data, shard, samples=SAMPLES):
    chosen = shard.samples(samples)
    images, labels = (part[chosen.start : chosen.stop] for part in data)
    return zip(images.split(CHUNK), labels.split(CHUNK), strict=True) if len(labels) else []


def part_of(model, data, index, count):
    shard = Shard(index, count)
    return score_shard(model, batches(data, shard), cross_entropy, SAMPLES, shard)


@pytest.fixture(scope="module")
def alone(model, data):
    return saliency_scores(model, batches(data, Shard()), cross_entropy)


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, score in found.items():
        assert torch.equal(score.view(torch.int32), expected[name].contiguous().view(torch.int32)), name


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_any_number_of_shards_gives_the_same_bits(model, data, alone, count):
    whole = PartialSums(SAMPLES)
    for index in reversed(range(count)):  # whichever comes first
        part = part_of(model, data, index, count)
        assert list(part.nodes) == layout(SAMPLES, Shard(index, count))
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
        for number in Shard(index, count).chunks(samples):
            part.add((0, number), {"w": chunks[number].clone()})
            covered.append(number)
        assert list(part.nodes) == layout(samples, Shard(index, count))
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
            assert_same_bits(saliency_scores(model, batches(data, Shard()), cross_entropy), alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_scoring_leaves_the_number_of_threads_alone(model, data):
    torch.set_num_threads(2)
    seen = []

    def watched():
        for batch in batches(data, Shard()):
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
def test_batches_that_are_not_the_shards_chunks_are_refused_with_the_cause(model, data, change, why):
    shard = Shard(0, 2)
    given = [*batches(data, shard)]
    if change == "missing":
        given.pop()
    elif change == "more":
        given.append(given[0])
    else:
        size = CHUNK - 1 if change == "short" else CHUNK + 1
        given[0] = tuple(part[:size] for part in data)
    with pytest.raises(DataError, match=f"shard 1/2: {why}. To fix it: give the samples 0 to 512 of 1180"):
        score_shard(model, given, cross_entropy, SAMPLES, shard)


def test_an_empty_forget_set_a_model_without_parameters_and_nan_are_refused(model, data):
    with pytest.raises(DataError, match="empty"):
        saliency_scores(model, [], cross_entropy)
    with pytest.raises(ModelError, match="no parameters"):
        saliency_scores(nn.Flatten(), [], cross_entropy)
    images = data[0].clone()
    images[7, 0, 2, 2] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        saliency_scores(model, batches((images, data[1]), Shard()), cross_entropy)


def test_an_incomplete_sum_gives_no_scores(model, data):
    with pytest.raises(UsageError, match="not complete"):
        part_of(model, data, 0, 2).scores()


def test_shard_text():
    assert (Shard.parse("2/8"), str(Shard(1, 8))) == (Shard(1, 8), "2/8")
    for text in ("0/8", "9/8", "2", "a/b", "-1/3", "1/0", "", "/"):
        with pytest.raises(UsageError, match="is not a shard"):
            Shard.parse(text)


def test_all_shards_of_a_count():
    assert [str(shard) for shard in Shard.all(3)] == ["1/3", "2/3", "3/3"]
    assert Shard.all(3) == [Shard.parse(f"{number}/3") for number in (1, 2, 3)]
    assert (Shard.all(1), len(Shard.all(shards.MAX_SHARDS))) == ([Shard()], shards.MAX_SHARDS)
    for count in (0, -1, shards.MAX_SHARDS + 1):
        with pytest.raises(UsageError, match=f"from 1 to {shards.MAX_SHARDS}"):
            Shard.all(count)
    with pytest.raises(UsageError, match="cannot be divided into 999999 shards"):
        Shard.parse("1/999999")


def header_of(model, shard, **changes):
    named = dict(model.named_parameters())
    facts = {
        "index": shard.index,
        "count": shard.count,
        "samples": SAMPLES,
        "shapes": {name: list(value.shape) for name, value in named.items()},
        "order": list(named),
        "model_digest": MODEL,
        "forget_set_digest": FORGET,
        "engine": "torch",
        "seconds": 1.5,
    }
    return ShardHeader(**{**facts, **changes})


@pytest.fixture(scope="module")
def written(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for index in range(3):
        part = part_of(model, data, index, 3)
        write_shard(folder / f"{index}.safetensors", part, header_of(model, Shard(index, 3)))
    return folder


OF = {"model_digest": MODEL, "forget_set_digest": FORGET}


def test_files_of_shards_merge_into_the_same_bits(written, alone):
    scores, facts = merge_shards([written / f"{index}.safetensors" for index in (2, 0, 1)], OF)
    assert_same_bits(scores, alone)
    assert facts == {"shards": "3", "engine": "torch", "seconds": "4.500"}


@pytest.mark.parametrize(
    ("given", "told"), [([0, 1], "missing: 3/3"), ([0, 1, 2, 1], "given twice"), ([], "no shard was given")]
)
def test_a_missing_shard_or_one_given_twice_is_refused(written, given, told):
    with pytest.raises(UsageError, match=told):
        merge_shards([written / f"{index}.safetensors" for index in given], OF)


@pytest.mark.parametrize("name", OF)
def test_a_shard_of_another_model_or_forget_set_is_refused(written, model, name):
    paths = [written / f"{index}.safetensors" for index in range(3)]
    with pytest.raises(IntegrityError, match=name.split("_")[0]):
        merge_shards(paths, OF | {name: "c" * 64})


def test_a_shard_of_another_division_is_refused(written, model, data, tmp_path):
    write_shard(tmp_path / "half", part_of(model, data, 1, 2), header_of(model, Shard(1, 2)))
    with pytest.raises(UsageError, match="do not belong together"):
        merge_shards([written / "0.safetensors", tmp_path / "half"], OF)


def test_a_damaged_shard_is_refused(written, model, data, tmp_path):
    whole = (written / "1.safetensors").read_bytes()
    damaged = tmp_path / "damaged"
    generator = torch.Generator().manual_seed(4)
    for place in [*torch.randint(8, len(whole), (60,), generator=generator).tolist(), len(whole) - 1]:
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(IntegrityError):
            read_shard(damaged)
        damaged.write_bytes(whole[:place])
        with pytest.raises(IntegrityError):
            read_shard(damaged)
    save_file({"a": torch.ones(2)}, damaged)
    with pytest.raises(IntegrityError, match="not a shard"):
        read_shard(damaged)
    write_shard(damaged, part_of(model, data, 0, 3), header_of(model, Shard(1, 3)))
    with pytest.raises(IntegrityError, match="do not match its header"):
        read_shard(damaged)
    with pytest.raises(UsageError, match="no shard"):
        read_shard(tmp_path / "absent")


def test_the_chunk_size_is_checked_in_the_files(monkeypatch, written):
    """A later version with other chunks must not add to these."""
    monkeypatch.setattr("salun_core.saliency.shard_file.CHUNK", 2 * shards.CHUNK)
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_shard(written / "0.safetensors")
