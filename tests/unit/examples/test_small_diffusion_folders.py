"""Small diffusion models the model folder loads, generates images and can be published."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import torch

from examples.small_diffusion import resolve_recipe, train
from salun_core.data import DataSpec
from salun_core.diffusion.families import family_of
from salun_core.diffusion.sampling import images
from salun_core.errors import DataError, UsageError
from salun_core.models.card import DiffusionEvaluation
from salun_core.models.diffusers_folder import load_diffusion, model_files
from salun_core.registry.lookup import read_head, read_version
from salun_core.tasks import register_model

pytestmark = pytest.mark.slow

DIGITS = DataSpec(source="digits", train_limit=64)
SHORT = {"steps": 2, "epochs": 2, "batch_size": 8, "channels": [8, 16], "head_channels": 4, "device": "cpu"}
EVALUATION = DiffusionEvaluation(steps=2, judge="judges")


def _drawn(folder):
    loaded = load_diffusion(folder)
    family = family_of(loaded)
    table = family.conditions([loaded.card.prompt_of("3")])
    return torch.cat(list(images(family.denoiser, table, family.sampler(EVALUATION), [0], [1], family.decode)))


def test_ddpm_is_trained_into_a_folder_that_draws(tmp_path):
    made = train(DIGITS, resolve_recipe("ddpm", SHORT), tmp_path / "model", EVALUATION)
    loaded = load_diffusion(tmp_path / "model")
    assert loaded.digest == made.digest
    assert loaded.network.config.num_class_embeds == 11
    assert (loaded.card.classes, loaded.card.evaluation) == ([str(digit) for digit in range(10)], EVALUATION)
    assert loaded.card.split_digest == loaded.split.digest
    assert loaded.card.training["steps"] == 2
    assert _drawn(tmp_path / "model").shape == (1, 3, 8, 8)


def test_stable_diffusion_is_trained_into_a_folder_that_draws(tmp_path):
    recipe = resolve_recipe(
        "stable-diffusion",
        {**SHORT, "autoencoder_channels": [8, 8], "autoencoder_steps": 2, "text_width": 16, "prompt": "a {label}"},
    )
    made = train(DIGITS, recipe, tmp_path / "model", EVALUATION)
    again = train(DIGITS, recipe, tmp_path / "again", EVALUATION)
    assert made.digest == again.digest
    loaded = load_diffusion(tmp_path / "model")
    assert loaded.card.prompt_of("3") == "a 3"
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(model_files(tmp_path / "model"))
    assert _drawn(tmp_path / "model").shape[-2:] == (8, 8)


@pytest.mark.s3
def test_folder_becomes_the_first_version_of_a_line(store, tmp_path):
    train(DIGITS, resolve_recipe("ddpm", SHORT), tmp_path / "model", EVALUATION)
    version = register_model(store, "digits", tmp_path / "model", "train", 64)
    head, _ = read_head(store, "digits")
    assert head.version == version
    files = read_version(store, "digits", version).files
    assert sorted(files) == sorted([*model_files(tmp_path / "model"), "model.json", "split.parquet"])


def test_images_that_the_recipe_cannot_halve_are_refused(tmp_path):
    with pytest.raises(DataError, match="multiple of 16"):
        train(DIGITS, resolve_recipe("ddpm", {**SHORT, "channels": [8] * 5}), tmp_path / "model")


def test_unknown_keys_of_a_recipe_are_named():
    with pytest.raises(UsageError, match="did you mean 'channels'"):
        resolve_recipe("ddpm", {"channel": [8]})
