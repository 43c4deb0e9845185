"""The published architectures on the meta device, against figures worked out by hand from their configurations."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
pytest.importorskip("transformers", reason="the diffusion extra is not installed")

from diffusers import DDPMScheduler  # noqa: E402

from lab.architectures import (  # noqa: E402
    architecture_config,
    architecture_names,
    build_architecture,
)
from salun_core.diffusion.denoiser import Denoiser  # noqa: E402
from salun_core.diffusion.process import Process  # noqa: E402
from salun_core.errors import UsageError  # noqa: E402
from salun_core.saliency import SaliencyMask  # noqa: E402
from tests.support.tiny_diffusion import selection_mask, shapes_of  # noqa: E402

TEXT_UNETS = {"sd-1.4-unet": 859_520_964, "sd-2.1-unet": 865_910_724, "sdxl-unet": 2_567_463_684}
OTHERS = {"sd-1.4-vae": 83_653_863, "sd-1.4-text-encoder": 123_060_480, "ddpm-cifar10-unet": 35_746_307 + 11 * 512}
PROCESS = Process.of_scheduler(DDPMScheduler())


@pytest.fixture(scope="module")
def denoisers():
    return {name: Denoiser(build_architecture(name), PROCESS) for name in [*TEXT_UNETS, "ddpm-cifar10-unet"]}


def weights_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def weights_in(denoiser, names):
    shapes = shapes_of(denoiser)
    return sum(math.prod(shapes[name]) for name in names)


def blocks(config):
    """Yield (kind, channels in, channels out, level, depth) of a U-Net's parts, from the configuration alone."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    attends = ["Attn" in name for name in config["down_block_types"]]
    depths = config.get("transformer_layers_per_block", [1] * len(widths))
    skips, now, last = [widths[0]], widths[0], len(widths) - 1
    for level, width in enumerate(widths):
        for _ in range(layers):
            yield "resnet", now, width, level, 0
            if attends[level]:
                yield "attention", width, width, level, depths[level]
            now = width
            skips.append(width)
        if level < last:
            yield "convolution", width, width, level + 1, 0
            skips.append(width)
    yield "resnet", now, now, last, 0
    yield "attention", now, now, last, depths[last]
    yield "resnet", now, now, last, 0
    for level in range(last, -1, -1):
        width = widths[level]
        for _ in range(layers + 1):
            yield "resnet", now + skips.pop(), width, level, 0
            if attends[level]:
                yield "attention", width, width, level, depths[level]
            now = width
        if level:
            yield "convolution", width, width, level - 1, 0


def size_of(kind, a, b, depth, time, context):
    """(weights, tensors) of one part; without a context, attention is the DDPM's plain one."""
    if kind == "convolution":
        return 9 * a * b + b, 2
    if kind == "resnet":
        shortcut = (a * b + b, 2) if a != b else (0, 0)
        return 2 * a + 9 * a * b + b + time * b + b + 2 * b + 9 * b * b + b + shortcut[0], 10 + shortcut[1]
    if context is None:
        return 2 * a + 4 * (a * a + a), 10
    block = 6 * a + (4 * a * a + a) + cross(a, context) + (8 * a * a + 8 * a) + (4 * a * a + a)
    return 2 * a + 2 * (a * a + a) + depth * block, 6 + depth * 20


def cross(width, context):
    return 2 * width * width + 2 * width * context + width


def by_hand(config):
    """(weights, tensors) of a whole U-Net."""
    first, time = config["block_out_channels"][0], 4 * config["block_out_channels"][0]
    context, channels = config.get("cross_attention_dim"), config["in_channels"]
    parts = [size_of(kind, a, b, depth, time, context) for kind, a, b, _, depth in blocks(config)]
    parts.append((9 * channels * first + first + 2 * first + 9 * first * channels + channels, 6))
    parts.append((first * time + time + time * time + time, 4))
    if "projection_class_embeddings_input_dim" in config:
        parts.append((config["projection_class_embeddings_input_dim"] * time + time + time * time + time, 4))
    if config.get("num_class_embeds"):
        parts.append((config["num_class_embeds"] * time, 1))
    return tuple(sum(column) for column in zip(*parts, strict=True))


def test_every_architecture_is_listed_and_has_the_published_number_of_weights(denoisers):
    assert architecture_names() == sorted([*TEXT_UNETS, *OTHERS])
    for name, weights in {**TEXT_UNETS, **OTHERS}.items():
        module = denoisers[name].network if name in denoisers else build_architecture(name)
        assert weights_of(module) == weights
        assert not module.training
        assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("name", [*TEXT_UNETS, "ddpm-cifar10-unet"])
def test_weights_and_tensors_by_hand(denoisers, name):
    network = denoisers[name].network
    assert (weights_of(network), len(list(network.parameters()))) == by_hand(architecture_config(name))


def test_the_layout_of_stable_diffusion(denoisers):
    shapes = shapes_of(denoisers["sd-1.4-unet"])
    assert len(shapes) == 686
    for name, shape in {
        "conv_in.weight": (320, 4, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (640, 320, 1, 1),
        "down_blocks.2.downsamplers.0.conv.weight": (1280, 1280, 3, 3),
        "down_blocks.3.resnets.1.time_emb_proj.bias": (1280,),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "up_blocks.1.resnets.2.conv1.weight": (1280, 1920, 3, 3),
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        "conv_out.weight": (4, 320, 3, 3),
    }.items():
        assert shapes[name] == shape
    assert list(shapes)[0] == "conv_in.weight"
    assert not any("attentions" in name for name in shapes if name.startswith(("down_blocks.3", "up_blocks.0")))


def test_the_selections_of_stable_diffusion_in_figures(denoisers):
    # Transformers of width 320, 640 and 1280: 5, 5 and 6. Each attn2 has 2 c² + 2 · 768 c + c, each attn1 4 c² + c.
    found = {part: denoisers["sd-1.4-unet"].selected(part) for part in ("full", "xattn", "selfattn", "noxattn")}
    weights = {part: weights_in(denoisers["sd-1.4-unet"], names) for part, names in found.items()}
    assert weights == {
        "full": 859_520_964,
        "xattn": 5 * 696_640 + 5 * 1_802_880 + 6 * 5_244_160,
        "selfattn": 5 * 409_920 + 5 * 1_639_040 + 6 * 6_554_880,
        "noxattn": 859_520_964 - 43_962_560 - (11_524 + 640) - (410_880 + 1_639_680),
    }
    assert {part: len(names) for part, names in found.items()} == {
        "full": 686,
        "xattn": 80,
        "selfattn": 80,
        "noxattn": 686 - 80 - 8,
    }
    assert not set(found["xattn"]) & {*found["selfattn"], *found["noxattn"]}


@pytest.mark.parametrize("name", TEXT_UNETS)
def test_selections_by_hand(denoisers, name):
    config = architecture_config(name)
    layers = [(a, depth) for kind, a, _, _, depth in blocks(config) if kind == "attention"]
    denoiser = denoisers[name]
    crossing = sum(depth * cross(width, config["cross_attention_dim"]) for width, depth in layers)
    assert weights_in(denoiser, denoiser.selected("xattn")) == crossing
    own = sum(depth * (4 * width * width + width) for width, depth in layers)
    assert weights_in(denoiser, denoiser.selected("selfattn")) == own


def test_the_ddpm_has_self_attention_alone(denoisers):
    denoiser = denoisers["ddpm-cifar10-unet"]
    six = 6 * (4 * (256 * 256 + 256) + 2 * 256)  # two on the way down, one in the middle, three on the way up
    assert weights_in(denoiser, denoiser.selected("selfattn")) == six
    with pytest.raises(UsageError, match="xattn is empty"):
        denoiser.selected("xattn")


def test_a_full_size_mask_takes_one_bit_a_weight(denoisers, tmp_path):
    mask = selection_mask(denoisers["sd-1.4-unet"], "xattn")
    assert (mask.weights, mask.k) == (859_520_964, 43_962_560)
    packed = sum(bits.nbytes for bits in mask.bits.values())
    assert packed == 107_440_121  # 859,520,964 / 8, and half a byte more for the four biases of conv_out
    mask.save(tmp_path / "mask.safetensors")
    size = (tmp_path / "mask.safetensors").stat().st_size
    assert packed < size <= 1.1 / 8 * mask.weights
    assert size - packed < 250_000
    assert SaliencyMask.load(tmp_path / "mask.safetensors") == mask


def test_a_forward_pass_of_stable_diffusion_by_hand(denoisers):
    config, side, words = architecture_config("sd-1.4-unet"), 64, 77
    total, time = 2 * 9 * side**2 * (4 * 320 + 320 * 4) + 2 * (320 * 1280 + 1280 * 1280), 1280
    for kind, a, b, level, depth in blocks(config):
        places = (side >> level) ** 2
        if kind == "convolution":
            total += 2 * places * 9 * a * b
        elif kind == "resnet":
            total += 2 * places * (9 * a * b + 9 * b * b + (a * b if a != b else 0)) + 2 * time * b
        else:
            own = 4 * places * a * a + 2 * places * places * a
            crossed = 2 * places * a * a + 2 * words * 768 * a + 2 * places * words * a
            total += 2 * (2 * places * a * a + depth * (own + crossed + 12 * places * a * a))
    noisy, told = torch.empty(1, 4, side, side, device="meta"), torch.empty(1, words, 768, device="meta")
    times = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoisers["sd-1.4-unet"].predict(noisy, times, {"encoder_hidden_states": told})
    assert counter.get_total_flops() == total == 803_273_441_280


def test_a_small_one_can_be_built_with_weights():
    network = build_architecture("ddpm-cifar10-unet", "cpu")
    denoiser = Denoiser(network, PROCESS)
    told = {"class_labels": torch.tensor([10])}
    with torch.no_grad():
        found = denoiser.predict(torch.zeros(1, 3, 32, 32), torch.tensor([7]), told)
    assert found.shape == (1, 3, 32, 32)
    assert bool(found.isfinite().all())


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="sd-1.4-unet"):
        build_architecture("sd-1.4-unett")
