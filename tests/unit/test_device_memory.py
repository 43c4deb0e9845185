"""Batches are halved when the device has no room for them, and the error says what was tried."""

import copy
import weakref

import pytest
import torch
from torch import nn

from salun_core.data.images import ImageSet
from salun_core.device_memory import LiveBytes, TrainingMemory, explained, fitting
from salun_core.diffusion.latents import decoder, latents_of
from salun_core.diffusion.sampling import samples
from salun_core.errors import DeviceMemoryError, ModelError
from salun_core.evaluation.image_classifier import ImageClassifier
from salun_core.evaluation.outputs import outputs_of, penultimate_features
from salun_core.saliency import saliency_scores
from salun_core.saliency.scores import CHUNK, Slice, score_slice
from tests.support.full_device import limited


def no_room():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(("size", "limit", "tried"), [(64, 64, [64]), (64, 20, [64, 32, 16]), (7, 1, [7, 3, 1])])
def test_the_batch_is_halved_until_it_fits(size, limit, tried):
    seen = []

    def work(batch):
        seen.append(batch)
        return no_room() if batch > limit else batch

    assert fitting(work, size) == (tried[-1], tried[-1])
    assert seen == tried


@pytest.mark.parametrize(("least", "tried"), [(1, [8, 4, 2, 1]), (3, [8, 4, 3]), (8, [8])])
def test_it_ends_at_the_smallest_batch_with_what_was_tried_and_what_to_change(least, tried):
    seen = []

    def work(batch):
        seen.append(batch)
        no_room()

    with pytest.raises(DeviceMemoryError) as caught:
        fitting(work, 8, least)
    assert seen == tried
    assert str(caught.value).startswith(f"out of memory on the device: a batch of {least} does not fit; CUDA out of")
    assert "Tried to allocate 2.00 GiB. To fix it: use a device with more memory" in str(caught.value)
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_the_tensors_of_a_failed_attempt_are_gone_before_the_next_one():
    kept = []

    def work(batch):
        assert all(reference() is None for reference in kept)
        held = torch.zeros(batch)
        kept.append(weakref.ref(held))
        return no_room() if batch > 2 else None

    fitting(work, 8)
    assert len(kept) == 3


def test_other_errors_pass_at_once():
    seen = []

    def work(batch):
        seen.append(batch)
        raise ModelError("a weight is not finite", "", "")

    with pytest.raises(ModelError):
        fitting(work, 8)
    assert seen == [8]


def test_an_error_is_explained_once():
    @explained()
    def step():
        with explained("256 samples do not fit", "use another device"):
            no_room()

    with pytest.raises(DeviceMemoryError, match=r"device: 256 samples do not fit; .*To fix it: use another device"):
        step()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return ImageSet(torch.randn(300, 1, 8, 8, generator=generator), torch.randint(4, (300,), generator=generator))


@pytest.mark.parametrize("limit", [1, 50, 299])
def test_outputs_and_features_of_a_classifier_do_not_depend_on_the_batch(net, images, limit):
    outputs, features = outputs_of(net, images), penultimate_features(net, images.images.split)
    room = limited(net, limit)
    found = outputs_of(net, images)
    assert room.refused
    torch.testing.assert_close(found.probabilities, outputs.probabilities, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.losses, outputs.losses, rtol=1e-5, atol=1e-6)
    assert (found.predictions == outputs.predictions).all()
    torch.testing.assert_close(penultimate_features(net, images.images.split), features, rtol=1e-5, atol=1e-6)
    assert net.training


def test_a_device_without_room_for_one_image_ends_the_evaluation(net, images):
    limited(net, 0)
    with pytest.raises(DeviceMemoryError, match="a batch of 1 does not fit"):
        outputs_of(net, images)
    assert net.training


def test_the_image_classifier_fits_its_batches(net):
    class Card:
        channels, height, width, classes = 1, 8, 8, list("abcd")
        mean, std = [0.5], [0.2]

    classifier = ImageClassifier(net, Card(), "0" * 64)
    pictures = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8)
    predicted, features = classifier.predict(pictures), classifier.features(pictures)
    room = limited(net, 100)
    assert torch.equal(classifier.predict(pictures), predicted)
    torch.testing.assert_close(classifier.features(pictures), features, rtol=1e-5, atol=1e-6)
    assert max(room.passed) == 64


def test_saliency_is_not_divided_because_its_bits_would_change(net, images):
    limited(net, CHUNK - 1)
    with pytest.raises(DeviceMemoryError, match="256 samples, which must be.*compute the mask on a CPU"):
        saliency_scores(net, images.batches(CHUNK), nn.functional.cross_entropy)
    with pytest.raises(DeviceMemoryError, match="256 samples, which must be scored at once"):
        score_slice(net, images.batches(CHUNK), nn.functional.cross_entropy, 300, Slice(0, 1))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training


def test_generated_images_and_latents_do_not_depend_on_the_batch():
    diffusers = pytest.importorskip("diffusers")
    from salun_core.diffusion.sampling import Sampler
    from tests.support.tiny_diffusion import class_table, class_unet

    denoiser, table = class_unet(), class_table()
    settings = {"steps": 2, "guidance_scale": 3.0, "batch_size": 8}
    sampler = Sampler.of_scheduler(diffusers.DDPMScheduler(), (1, 8, 8), latents=True, **settings)
    rows, seeds = [0, 1, 2, 0, 1, 2, 0, 1, 2], list(range(9))
    whole = torch.cat(list(samples(denoiser, table, sampler, rows, seeds)))
    room = limited(denoiser.network, 4)  # under guidance each sample takes two
    parts = list(samples(denoiser, table, sampler, rows, seeds))
    assert [len(part) for part in parts] == [2, 2, 2, 2, 1]
    assert room.refused == [16, 8]  # once: the next batches begin with the size that fits
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_the_autoencoder_fits_its_batches():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8).eval()
    pictures = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    (mean, std), latents = latents_of(vae, pictures), torch.randn(7, 2, 8, 8)
    decoded = decoder(vae)(latents)
    limited(vae.encoder, 2), limited(vae.decoder, 2)
    found_mean, found_std = latents_of(vae, pictures)
    torch.testing.assert_close(found_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_std, std, rtol=1e-4, atol=1e-5)
    assert (decoder(vae)(latents).int() - decoded.int()).abs().max() <= 1


@pytest.fixture(scope="module")
def small():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 32))


def squares(network, count):
    return network(torch.zeros(count, 3, 8, 8)).square().mean()


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_predicted_pass_has_the_bytes_of_a_real_one(small, count):
    network = copy.deepcopy(small)
    with LiveBytes(network.parameters()) as counted:
        squares(network, count).backward()
    predicted = TrainingMemory.of(small, squares, "float32").scoring(count)
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert predicted - weights == pytest.approx(counted.peak, rel=0.02)


def test_a_prediction_leaves_the_network_alone(small):
    before = [parameter.clone() for parameter in small.parameters()]
    TrainingMemory.of(small, squares, "bf16")
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in small.parameters())


def test_a_network_that_no_machine_has_room_for_is_predicted():
    side = 1_000_000
    network = nn.Linear(side, side, bias=False, device="meta")
    memory = TrainingMemory.of(network, lambda layer, count: layer(torch.zeros(count, side)).sum(), "float32")
    assert memory.parameters == side**2
    assert memory.step(1, "adam") == pytest.approx(21 * side**2, rel=1e-3)


def test_each_setting_adds_its_bytes_per_weight():
    memory = TrainingMemory(100, [(400, 8), (0, 80)])
    assert (memory.scoring(1), memory.scoring(10)) == (400 + 408, 400 + 800)
    assert memory.step(1, "adam") == 100 * (4 + 4 + 8 + 1) + 408
    assert memory.step(10, "adam", offload=True) == 100 * (4 + 1) + 800
    assert memory.step(1, "adam", gpu=True) == 100 * (4 + 4 + 8 + 1) + 800
    assert memory.step(1, "sgd", momentum=0, masked=False) == 100 * (4 + 4) + 408
    assert memory.step(1, "adamw", offload=True, frozen_copies=1) == 100 * (4 + 4 + 1) + 408
    assert TrainingMemory(100, [(0, 8)]).step(1, "adam", offload=True) == 100 * (4 + 1 + 4)  # gradients at the step
