"""Tiny diffusers folders of every family, with random weights: built by configuration, saved as diffusers saves."""

import json
from pathlib import Path

import torch

PROMPTS = ["an image of a zero", "an image of a one", "an image of a two"]
CLASSES = ["zero", "one", "two"]
SIDE, LENGTH, WIDTH = 8, 12, 16


def tokenizer():
    from examples.small_diffusion.recipes import build_tokenizer

    return build_tokenizer(PROMPTS, LENGTH)


def _text(kind, width=WIDTH, **changes):
    import transformers

    made = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(made),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.eos_token_id,
        **changes,
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


def _unet(width, **changes):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": SIDE // 2,
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


def stable_diffusion(prediction="epsilon"):
    """SD 1.x; 2.x with v-prediction and the last layer but one."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type=prediction
    )
    return StableDiffusionPipeline(
        _vae(), _text("CLIPTextModel"), tokenizer(), _unet(WIDTH), scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_2():
    return stable_diffusion("v_prediction")


def stable_diffusion_xl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(
        2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
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
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=4,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer,
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
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
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
    return DDPMPipeline(unet, DDPMScheduler())


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
