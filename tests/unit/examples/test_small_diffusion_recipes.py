"""Recipes of small diffusion models: networks, tokenizer and validation."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import torch

from examples.small_diffusion.recipes import (
    DdpmRecipe,
    StableDiffusionRecipe,
    build_autoencoder,
    build_ddpm,
    build_scheduler,
    build_text_unet,
    build_tokenizer,
)
from salun_core.config import parse
from salun_core.errors import UsageError


def test_default_sizes_match_the_documentation():
    recipe = StableDiffusionRecipe()
    count = lambda network: sum(parameter.numel() for parameter in network.parameters())  # noqa: E731
    assert count(build_text_unet(recipe, 8)) == 1_077_572
    assert count(build_autoencoder(recipe, 32, 3)) == 242_327
    assert count(build_ddpm(DdpmRecipe(), 10, 16, 1)) == 702_753


def test_autoencoder_downscales_as_the_recipe_sets():
    recipe = StableDiffusionRecipe()
    latent = build_autoencoder(recipe, 32, 3).encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert tuple(latent.shape) == (1, 4, 8, 8)
    assert recipe.downscale == 4


def test_scheduler_has_the_noise_schedule_of_the_recipe():
    kept = build_scheduler(DdpmRecipe(noise="linear"))
    assert float(kept.betas[0]) == pytest.approx(1e-4)
    assert float(kept.betas[-1]) == pytest.approx(0.02)
    assert build_scheduler(StableDiffusionRecipe(prediction="v_prediction")).config.prediction_type == "v_prediction"


def test_words_of_the_prompts_are_one_token_and_others_are_split():
    tokenizer = build_tokenizer(["an image of a sneaker", "an image of a t-shirt"], 16)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("An  image of a sneaker").input_ids
    assert (len(ids), ids[0], ids[-1]) == (7, begin, end)
    split = tokenizer("hübsch").input_ids
    assert (len(split), tokenizer.unk_token_id in split[1:-1]) == (9, False)
    assert tokenizer("a", padding="max_length", max_length=16).input_ids[3:] == [end] * 13


def test_tokenizer_does_not_depend_on_the_order_of_prompts():
    prompts = [f"an image of a {name}" for name in ("coat", "bag", "ankle boot", "dress")]
    assert build_tokenizer(prompts, 16).get_vocab() == build_tokenizer(prompts[::-1], 16).get_vocab()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"steps": 10, "epochs": 3}, "cannot be spread over 3 epochs"),
        ({"channels": [12]}, "multiple of 8"),
        ({"prompt": "a bag"}, "must contain {label}"),
        ({"autoencoder_channels": [16, 12]}, "each of autoencoder_channels"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_invalid_recipes_are_refused(change, fault):
    with pytest.raises(UsageError, match=fault):
        parse(StableDiffusionRecipe, change, "recipe")
