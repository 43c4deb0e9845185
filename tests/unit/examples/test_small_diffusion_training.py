"""Training of small diffusion models: loss, exact resume, moving average."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")
pytest.importorskip("transformers", reason="the `diffusion` extra is not installed")

import torch
from torch import nn

from examples.small_diffusion.recipes import (
    DdpmRecipe,
    StableDiffusionRecipe,
    build_autoencoder,
    build_ddpm,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
)
from examples.small_diffusion.training import Averaged, train_autoencoder, train_denoiser, train_text_encoder
from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples
from salun_core.diffusion.latents import pixels_of
from salun_core.diffusion.process import Process
from salun_core.methods.checkpoint import FileCheckpoint

RECIPE = DdpmRecipe(
    channels=[8, 16], head_channels=4, steps=12, epochs=3, batch_size=16, average=0.9, seed=3, device="cpu"
)


def _digits(count=64):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:count] * 15.9375).to(torch.uint8).unsqueeze(1)
    return images, torch.tensor(digits.target[:count])


def _train(checkpoint=None, on_epoch=None, recipe=RECIPE):
    images, labels = _digits()
    torch.manual_seed(0)
    denoiser = Denoiser(build_ddpm(recipe, 10, 8, 1), Process.of_scheduler(build_scheduler(recipe)))
    table = ConditionTable([*map(str, range(10)), ""], {"class_labels": torch.arange(11)}, 10)
    return train_denoiser(denoiser, Examples(pixels_of(images), labels), table, recipe, checkpoint, on_epoch)


def _equal(first, second):
    one, other = first.network.state_dict(), second.network.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole():
    """An uninterrupted training: the denoiser, and the loss of each epoch."""
    records = []
    return _train(on_epoch=records.append), [record.losses["denoising"] for record in records]


def test_loss_falls(whole):
    denoiser, losses = whole
    assert losses[-1] < losses[0]
    assert not denoiser.network.training


def test_resumed_training_gives_the_same_average(whole, tmp_path):
    def stop(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    store = FileCheckpoint(tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        _train(store, stop)
    assert _equal(_train(store), whole[0])


def test_average_follows_its_decay():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 0.0)
    averaged = Averaged(network, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 4.0, -2.0, 8.0], start=1):
        nn.init.constant_(network.weight, value)
        averaged.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert averaged.result().weight.item() == pytest.approx(expected)


def test_without_decay_the_result_is_the_network_itself():
    network = nn.Linear(1, 1)
    averaged = Averaged(network, 0.0)
    averaged.update()
    assert averaged.result() is network


def test_autoencoder_learns_and_scaled_latents_have_unit_variance():
    recipe = StableDiffusionRecipe(
        autoencoder_channels=[8, 8], autoencoder_steps=30, epochs=3, steps=3, batch_size=16, device="cpu"
    )
    images, _ = _digits()
    torch.manual_seed(0)
    autoencoder, records = build_autoencoder(recipe, 8, 1), []
    train_autoencoder(autoencoder, images, recipe, on_epoch=records.append)
    assert records[-1].losses["reconstruction"] < 0.7 * records[0].losses["reconstruction"]
    with torch.no_grad():
        mean = autoencoder.encode(pixels_of(images)).latent_dist.mean
    assert float(mean.std()) * autoencoder.config.scaling_factor == pytest.approx(1, abs=1e-3)


def test_text_encoder_learns_to_distinguish_prompts():
    """The measure is the largest cosine between the mean embeddings of two prompts; with fresh weights it is near 1."""
    recipe = StableDiffusionRecipe(text_width=16, text_layers=1)
    prompts = ["an image of a bag", "an image of a coat", "an image of a dress", ""]
    tokenizer = build_tokenizer(prompts, 16)
    tokens = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    torch.manual_seed(0)
    encoder = build_text_encoder(recipe, len(tokenizer), (tokenizer.bos_token_id, tokenizer.eos_token_id)).eval()

    def nearest():
        with torch.no_grad():
            means = nn.functional.normalize(encoder(tokens)[0].mean(1), dim=-1)
        return float((means @ means.T - 2 * torch.eye(4)).max())

    before = nearest()
    train_text_encoder(encoder, tokens, recipe)
    assert nearest() < 0.3 < before
