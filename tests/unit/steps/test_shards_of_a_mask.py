"""A mask in shards has the bits of the mask of one process, for any count of shards and any size of forget set."""

import itertools
import json
import random

import pytest
import torch

from salun_core.data import DataSpec
from salun_core.errors import UsageError
from salun_core.methods.classification import UnlearnConfig
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.saliency.scores import CHUNK, Shard
from salun_core.saliency.shard_file import merge_shards, read_shard
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask, merge_scores, score_shard
from salun_core.tasks.classification.training import train_model

SIZES = (1, 131, CHUNK, CHUNK + 1, 1000)
COUNTS = (1, 3, 8)
DENSITY = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = UnlearnConfig(epochs=1, learning_rate=0.05, batch_norm="update", device="cpu")
    train_model(DataSpec(source="digits"), "resnet8", config, folder)
    return folder


@pytest.fixture(scope="module")
def contexts(model, tmp_path_factory):
    """The run that forgets the first samples of the training split, by their number."""
    ids, folder = sorted(load_model(model).split.train), tmp_path_factory.mktemp("forget")
    made = {}
    for size in SIZES:
        path = folder / f"{size}.json"
        path.write_text(json.dumps({"kind": "samples", "ids": ids[:size]}))
        made[size] = RunContext(model, str(path), device="cpu")
    return made


@pytest.fixture(scope="module")
def alone(contexts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    recipe = Recipe(density=DENSITY)
    return {size: compute_mask(context, recipe, folder / str(size)) for size, context in contexts.items()}


@pytest.fixture(scope="module", params=itertools.product(SIZES, COUNTS), ids=lambda case: f"{case[0]}-on-{case[1]}")
def scored(request, contexts, tmp_path_factory):
    """Size, context and the files of all shards."""
    size, count = request.param
    folder = tmp_path_factory.mktemp("scored")
    paths = []
    for shard in Shard.all(count):
        paths.append(folder / f"{shard.index}.safetensors")
        score_shard(contexts[size], shard, paths[-1])
    return size, contexts[size], paths


def orders(paths):
    """All orders of three files; some of more."""
    if len(paths) <= 3:
        return list(itertools.permutations(paths))
    return [random.Random(seed).sample(paths, len(paths)) for seed in range(6)] + [paths[::-1]]


def test_shards_merge_in_any_order_into_the_mask_of_one_process(scored, alone, tmp_path):
    size, context, paths = scored
    for number, order in enumerate(orders(paths)):
        mask = merge_scores(context, order, DENSITY, tmp_path / str(number))
        assert mask.digest == alone[size].digest
        assert mask.facts["threshold"] == alone[size].facts["threshold"]
        assert mask.facts["shards"] == str(len(paths))


def test_the_merged_scores_have_the_bits_of_one_process(scored):
    size, context, paths = scored
    config = context.task.methods["salun"].config_type()
    expected = context.task.score(context.inputs, config, torch.device("cpu"), SINGLE_PROCESS).values
    scores, _ = merge_shards(paths[::-1], context.inputs.digests)
    assert list(scores) == list(expected)
    for name, score in scores.items():
        assert torch.equal(score.view(torch.int32), expected[name].contiguous().view(torch.int32)), name


def test_a_shard_without_a_chunk_is_a_valid_file(scored):
    size, _, paths = scored
    chunks = -(-size // CHUNK)
    parts = [read_shard(path) for path in paths]
    assert sum(not part.nodes for _, part in parts) == max(0, len(paths) - chunks)
    for header, part in parts:
        assert bool(part.nodes) == bool(header.shard.chunks(size))
        assert header.samples == part.samples == size


def test_empty_shards_alone_are_refused(contexts, tmp_path):
    paths = [tmp_path / f"{shard.index}" for shard in Shard.all(3)]
    for shard, path in zip(Shard.all(3), paths, strict=True):
        score_shard(contexts[131], shard, path)
    with pytest.raises(UsageError, match="1 shard is missing: 3/3"):
        merge_scores(contexts[131], paths[:2], DENSITY, tmp_path / "mask")
    assert not (tmp_path / "mask").exists()


def test_an_empty_shard_of_another_forget_set_is_refused(contexts, tmp_path):
    """It adds nothing to the sum, but it shows that the files were mixed up."""
    for shard in Shard.all(3):
        score_shard(contexts[256 if shard.index else 257], shard, tmp_path / f"{shard.index}")
    with pytest.raises(UsageError, match="shard 1/3 and shard 2/3 differ in the number of samples to forget"):
        merge_scores(contexts[256], [tmp_path / f"{index}" for index in range(3)], DENSITY, tmp_path / "mask")
