"""Tiny diffusion models with random weights, of the real architectures.

Denoisers with conditions and the 8x8 digits to forget, for the methods; diffusers folders of every family, saved as
diffusers saves them, for what reads models.
"""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, noised
from salun_core.diffusion.process import Process
from salun_core.methods.diffusion import ExampleSets
from salun_core.saliency import SaliencyMask

SIDE = 8
NULL, LENGTH, WIDTH = 3, 5, 12  # of the tables: three conditions and the null one
PROMPTS = ["an image of a zero", "an image of a one", "an image of a two"]
CLASSES = ["zero", "one", "two"]
TEXT_LENGTH, TEXT_WIDTH = 12, 16  # of the text encoders in the folders


def _cross_attention_unet(size, width, **changes):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": size,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": width,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    }
    return UNet2DConditionModel(**settings).eval()


def _class_unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=len(CLASSES) + 1,
    ).eval()


def _joint_transformer(size, channels, width, pooled):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=16,
        pooled_projection_dim=pooled,
        pos_embed_max_size=size,
    ).eval()


def text_unet(seed=0, prediction="epsilon", **changes):
    """A U-Net with cross-attention, as in Stable Diffusion: 64 k weights."""
    from diffusers import DDPMScheduler

    torch.manual_seed(seed)
    network = _cross_attention_unet(SIDE, WIDTH, **{"in_channels": 1, "out_channels": 1, **changes})
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    return Denoiser(network, Process.of_scheduler(scheduler))


def class_unet(seed=0):
    """A U-Net that is told classes, as a DDPM."""
    from diffusers import DDPMScheduler

    torch.manual_seed(seed)
    return Denoiser(_class_unet(), Process.of_scheduler(DDPMScheduler()))


def flow_transformer(seed=0):
    """A transformer that joins text and image, trained by flow matching, as SD 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    network = _joint_transformer(SIDE, 1, WIDTH, 8)
    return Denoiser(network, Process.of_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)))


def pixart(seed=0):
    """A transformer with cross-attention that projects its text first."""
    from diffusers import DDPMScheduler, PixArtTransformer2DModel

    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(
        sample_size=SIDE,
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


def tokenizer():
    from examples.small_diffusion.recipes import build_tokenizer

    return build_tokenizer(PROMPTS, TEXT_LENGTH)


def _text(kind):
    import transformers

    made = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(made),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.eos_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def _vae(**changes):
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": SIDE,
        "scaling_factor": 0.5,
        **changes,
    }
    return AutoencoderKL(**settings).eval()


def stable_diffusion(prediction="epsilon"):
    """SD 1.x; 2.x with v-prediction and the last layer but one."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type=prediction
    )
    return StableDiffusionPipeline(
        _vae(),
        _text("CLIPTextModel"),
        tokenizer(),
        _cross_attention_unet(SIDE // 2, TEXT_WIDTH),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def stable_diffusion_2():
    return stable_diffusion("v_prediction")


def stable_diffusion_xl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _cross_attention_unet(
        SIDE // 2,
        2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + TEXT_WIDTH,
    )
    return StableDiffusionXLPipeline(
        _vae(),
        _text("CLIPTextModel"),
        _text("CLIPTextModelWithProjection"),
        tokenizer(),
        tokenizer(),
        unet,
        EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


def stable_diffusion_3():
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        _joint_transformer(SIDE // 2, 4, 2 * TEXT_WIDTH, 2 * TEXT_WIDTH),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        _vae(shift_factor=0.1),
        _text("CLIPTextModelWithProjection"),
        tokenizer(),
        _text("CLIPTextModelWithProjection"),
        tokenizer(),
        None,
        None,
    )


def ddpm():
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(_class_unet(), DDPMScheduler())


def dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=len(CLASSES),
        norm_num_groups=4,
    ).eval()
    return DiTPipeline(transformer, _vae(), DDIMScheduler())


FAMILIES = {
    "sd1": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "ddpm": ddpm,
    "dit": dit,
}
CLASS_TOLD = {"ddpm", "dit"}


def save_raw(name, folder, **options):
    """Save a family's pipeline as diffusers does; no card."""
    torch.manual_seed(0)
    pipeline = FAMILIES[name]()
    pipeline.save_pretrained(folder, **options)
    return folder


def text_components():
    """The parts of a Stable Diffusion that encode prompts."""
    from salun_core.models.diffusers_folder import Components

    torch.manual_seed(1)
    parts = {"tokenizer": tokenizer(), "text_encoder": _text("CLIPTextModel")}
    return Components(Path(), "StableDiffusionPipeline", parts, {}, "")


def save_model_folder(name, folder, tmp, **options):
    """Save a family as a model folder, by way of the import."""
    from salun_core.tasks.diffusion.importing import import_diffusion

    raw = save_raw(name, tmp / f"raw-{name}")
    import_diffusion(str(raw), None, folder, classes=CLASSES, **options)
    return folder


def edit_json(path, **changes):
    """Change keys of a JSON file; None removes one."""
    document = json.loads(path.read_text())
    for key, value in changes.items():
        document.pop(key, None) if value is None else document.update({key: value})
    path.write_text(json.dumps(document))
