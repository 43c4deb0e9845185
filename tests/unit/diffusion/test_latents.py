"""Latents: the autoencoder's own distribution, scaled, and back."""

import pytest

pytest.importorskip("diffusers", reason="the `diffusion` extra is not installed")

import torch

from salun_core.diffusion.latents import decoder, latents_of, pixels_of
from salun_core.diffusion.sampling import to_bytes
from salun_core.errors import ModelError


@pytest.fixture
def autoencoder():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_go_from_minus_one_to_one():
    assert pixels_of(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[[[-1.0, 1.0]]]]


def test_latents_are_the_scaled_distribution_in_any_batch_size(autoencoder, images):
    with torch.no_grad():
        wanted = autoencoder.encode(images / 127.5 - 1).latent_dist
    for size in (2, 5):
        mean, std = latents_of(autoencoder, images, size)
        torch.testing.assert_close(mean, (wanted.mean - 0.5) * 0.25, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(std, wanted.std * 0.25, atol=1e-6, rtol=1e-5)
        assert not mean.requires_grad


def test_decoder_undoes_the_scaling(autoencoder, images):
    with torch.no_grad():
        raw = autoencoder.encode(images / 127.5 - 1).latent_dist.mean
        wanted = to_bytes(autoencoder.decode(raw).sample)
    found = decoder(autoencoder)((raw - 0.5) * 0.25)
    assert int((found.int() - wanted.int()).abs().max()) <= 1


def test_half_precision_is_encoded_in_float32_and_restored(autoencoder, images):
    mean, _ = latents_of(autoencoder.half(), images)
    assert (mean.dtype, autoencoder.dtype) == (torch.float32, torch.float16)


def test_nan_latents_are_refused(autoencoder, images):
    with torch.no_grad():
        autoencoder.quant_conv.bias[0] = float("nan")
    with pytest.raises(ModelError, match="latents are not finite"):
        latents_of(autoencoder, images)
