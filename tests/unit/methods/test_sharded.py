"""Sharding by configuration: which blocks are divided, what a process holds, and what cannot be sharded.

Training with sharded weights in two processes is in `test_distributed.py`.
"""

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from salun_core.errors import UsageError
from salun_core.methods.classification import method_config, unlearn
from salun_core.methods.diffusion import diffusion_config
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.methods.sharded import blocks_of, bytes_per_process, shard_weights
from salun_core.saliency.masked_step import own, own_part

PROCESSES = 8
SDXL = {  # the configuration of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def vit():
    return torchvision.models.vit_l_16(weights=None)


def sdxl():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**SDXL)


@pytest.fixture
def one_of_eight():
    """The first of eight processes that exchange nothing: torch's own group for dry runs."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "weights", "blocks", "largest", "outside", "alone", "each"),
    [
        (vit, 304_326_632, 24, 12_596_224, 2_017_256, 5.17, 0.81),
        (sdxl, 2_567_463_684, 104, 49_164_800, 7_320_004, 43.65, 6.08),
    ],
)
def test_a_large_model_is_divided_block_by_block(one_of_eight, make, weights, blocks, largest, outside, alone, each):
    """On the meta device; memory in gigabytes, with Adam and a mask, without activations."""
    with torch.device("meta"):
        model = make()
    memory = [bytes_per_process(model, size) for size in (1, PROCESSES)]
    shard_weights(model, torch.device("cpu"))
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == blocks + 1
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    mine = sum(own(parameter).numel() for parameter in model.parameters())
    assert mine == pytest.approx(weights / PROCESSES, rel=0.005)
    assert memory == [17 * weights, 17 * mine + 4 * (outside + 3 * largest)]
    assert [number / 1e9 for number in memory] == pytest.approx([alone, each], abs=0.005)


def test_the_slices_of_all_processes_are_the_tensor(one_of_eight):
    """Nine rows among eight processes: two each for the first four, one for the fifth, and none for the others."""
    layer = shard_weights(nn.Linear(2, 9), torch.device("cpu"))
    weight, mesh = layer.weight, layer.weight.device_mesh
    rows = torch.arange(18).view(9, 2)
    assert torch.equal(own_part(rows, weight), rows[:2])
    assert own(weight).shape == (2, 2)
    parts = []
    for rank in range(PROCESSES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(mesh), "get_local_rank", lambda self, rank=rank: rank)
            parts.append(own_part(rows, weight))
    assert torch.equal(torch.cat(parts), rows)
    assert [len(part) for part in parts] == [2, 2, 2, 2, 1, 0, 0, 0]


def test_blocks_are_elements_of_sequences_with_several_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), nn.ReLU())
    assert list(blocks_of(model)) == ["1"]
    assert list(blocks_of(torchvision.models.resnet18(weights=None))) == [
        f"layer{stage}.{number}" for stage in range(1, 5) for number in range(2)
    ]


@pytest.mark.parametrize(
    ("config", "method", "settings", "message"),
    [
        (method_config, "salun_adaptive", {}, "choose the method salun"),
        (method_config, "influence", {}, "influence cannot shard"),
        (method_config, "retrain", {}, "retrain cannot shard"),
        (method_config, "salun", {"forget_parts": 2}, "forget_parts"),
        (diffusion_config, "uce", {}, "uce cannot shard"),
        (diffusion_config, "salun", {"offload": "cpu"}, "offload"),
    ],
)
def test_what_needs_whole_weights_is_refused(config, method, settings, message):
    with pytest.raises(UsageError, match=message):
        config(method, {"sharding": "fsdp", **settings})


def test_one_process_cannot_shard():
    images, config = (torch.zeros(2, 1), torch.arange(2)), {"sharding": "fsdp", "device": "cpu"}
    with pytest.raises(UsageError, match="torchrun"):
        unlearn(nn.Linear(1, 2), "finetune", forget=images, retain=images, config=config, group=SINGLE_PROCESS)
