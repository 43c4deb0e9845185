"""Tiny networks of the real architectures, and the 8x8 digits as something to forget."""

import torch
from sklearn.datasets import load_digits

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.process import Process
from salun_core.methods.diffusion import ExampleSets
from salun_core.saliency import SaliencyMask

NULL, LENGTH, WIDTH = 3, 5, 12  # of the tables: three conditions and the null one


def text_unet(seed=0, prediction="epsilon", **changes):
    """A U-Net with cross-attention, as in Stable Diffusion: 64 k weights."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    }
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    return Denoiser(UNet2DConditionModel(**settings).eval(), Process.of_scheduler(scheduler))


def class_unet(seed=0):
    """A U-Net that is told classes, as a DDPM."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    )
    return Denoiser(network.eval(), Process.of_scheduler(DDPMScheduler()))


def flow_transformer(seed=0):
    """A transformer that joins text and image, trained by flow matching, as SD 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(seed)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    return Denoiser(network.eval(), Process.of_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)))


def pixart(seed=0):
    """A transformer with cross-attention that projects its text first."""
    from diffusers import DDPMScheduler, PixArtTransformer2DModel

    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        norm_num_groups=4,
    )
    return Denoiser(network.eval(), Process.of_scheduler(DDPMScheduler()))


def text_table(tokens=(), pooled=False):
    generator = torch.Generator().manual_seed(5)
    rows = {"encoder_hidden_states": torch.randn(4, LENGTH, WIDTH, generator=generator)}
    if pooled:
        rows["pooled_projections"] = torch.randn(4, 8, generator=generator)
    return ConditionTable(["zero", "one", "two", ""], rows, NULL, tokens)


def class_table():
    return ConditionTable(["zero", "one", "two", ""], {"class_labels": torch.arange(4)}, NULL)


def digits_sets(table, pixels=True, count=16):
    """Forget the zeros, which are to look like ones; keep the ones and twos."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    zeros, others = (labels == 0).nonzero()[:count, 0], ((labels == 1) | (labels == 2)).nonzero()[: 2 * count, 0]
    forget = Examples(images[zeros], labels[zeros], pseudo=torch.ones(len(zeros), dtype=torch.int64))
    return ExampleSets(forget, Examples(images[others], labels[others]), table, pixels)


def batches(denoiser, sets, count=6, seed=0):
    """One forget batch and one retain batch, noised."""
    from salun_core.diffusion.examples import noised

    generator = torch.Generator().manual_seed(seed)
    return tuple(
        noised(examples.select(range(count)), denoiser.process, generator) for examples in (sets.forget, sets.retain)
    )


KINDS = {
    "text": (text_unet, text_table),
    "class": (class_unet, class_table),
    "flow": (flow_transformer, lambda: text_table(pooled=True)),
}


def lab(kind):
    """A denoiser with its sets."""
    make, table = KINDS[kind]
    return make(), digits_sets(table())


def shapes_of(denoiser):
    """The shape of every parameter, in the network's order."""
    return {name: tuple(parameter.shape) for name, parameter in denoiser.network.named_parameters()}


def denoiser_mask(denoiser, scores, density):
    """A mask over all parameters from the scores of some."""
    return SaliencyMask.from_scores(scores, density).within(shapes_of(denoiser))


def selection_mask(denoiser, selection):
    """A mask in which every selected weight is salient."""
    shapes = shapes_of(denoiser)
    return SaliencyMask.full({name: shapes[name] for name in denoiser.selected(selection)}).within(shapes)
