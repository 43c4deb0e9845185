"""FID and KID against the closed form of two Gaussians, scipy, and sums over pairs."""

import shlex

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from salun_core.errors import IntegrityError, ModelError, UsageError
from salun_core.evaluation.image_classifier import ImageClassifier
from salun_core.evaluation.image_features import (
    classifier_extractor,
    frechet_distance,
    inception_extractor,
    joined_features,
    kernel_distance,
)
from salun_core.models import load_model

pytest.importorskip("torchmetrics", reason="the extra `diffusion` is not installed")


def means(images):
    """Features: the mean of each channel."""
    return images.float().mean(dim=(2, 3))


def images(count, seed, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)


def closed_form(a, b):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in numpy."""
    c1, c2 = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root))


def unbiased_mmd(a, b):
    """The mean of (x.y / F + 1)^3 over pairs, without pairs of an image with itself."""
    kernel = lambda x, y: (float(x @ y) / len(x) + 1) ** 3  # noqa: E731
    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    return sum(within) - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_fid_is_the_distance_of_two_gaussians():
    real, made = means(images(90, 0)), means(images(70, 1, 40, 200))
    found = frechet_distance(real, made)
    assert found == pytest.approx(closed_form(real.double().numpy(), made.double().numpy()), rel=1e-9)
    assert found > 1


def test_fid_of_a_shift_is_its_square_and_of_itself_zero():
    real = images(50, 0, 0, 200)
    shifted = real + torch.tensor([3, 4, 12], dtype=torch.uint8).view(1, 3, 1, 1)
    assert frechet_distance(means(real), means(shifted)) == pytest.approx(9 + 16 + 144, rel=1e-9)
    assert frechet_distance(means(real), means(real)) == pytest.approx(0, abs=1e-6)


def test_fid_of_many_features_and_few_images_is_finite():
    generator = torch.Generator().manual_seed(0)
    found = frechet_distance(torch.randn(5, 40, generator=generator), torch.randn(6, 40, generator=generator))
    assert 0 <= found < 1000


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_kid_is_the_sum_over_pairs(scale):
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(20, 5, generator=generator) * scale, torch.randn(20, 5, generator=generator) * scale + 0.3
    assert kernel_distance(a, b) == pytest.approx(unbiased_mmd(a.double().numpy(), b.double().numpy()), rel=1e-6)


def test_kid_of_sets_of_two_sizes_draws_the_same_each_time():
    real, made = means(images(40, 0)), means(images(25, 1, 0, 128))
    state = torch.random.get_rng_state()
    found = kernel_distance(real, made)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert kernel_distance(real, made) == found
    assert found == pytest.approx(unbiased_mmd(real.double().numpy(), made.double().numpy()), rel=0.1)
    assert abs(kernel_distance(real, means(images(40, 9)))) < found / 10


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_fewer_than_two_images_have_no_distance(distance):
    nine, one = means(images(9, 0)), means(images(1, 1))
    assert distance(nine, one) is distance(one, nine) is distance(torch.empty(0, 0), nine) is None


def test_features_of_another_size_are_refused():
    with pytest.raises(ModelError, match="two sizes"):
        joined_features([torch.zeros(3, 3), torch.zeros(4, 4)])
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ModelError, match="two sizes"):
            distance(torch.zeros(3, 3), torch.zeros(4, 4))
    with pytest.raises(ModelError, match="not numbers"):
        joined_features([torch.full((3, 3), float("nan"))])


def test_features_of_batches_are_joined():
    whole = means(images(9, 0))
    assert torch.equal(joined_features(whole.split(4)), whole)
    assert joined_features([]).shape == (0, 0)


def test_a_classifier_is_an_extractor(digits_model):
    classifier = ImageClassifier.of(load_model(digits_model))
    extractor = classifier_extractor(classifier)
    assert extractor.name == f"judge:{classifier.digest}"
    assert torch.equal(extractor.features(images(5, 0)), classifier.features(images(5, 0)))
    assert frechet_distance(extractor.features(images(20, 0)), extractor.features(images(20, 1, 0, 60))) > 0


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights: (network, its weights as safetensors)."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is missing")
    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"], str(empty)).eval()
    path = empty.with_name("inception.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return network, path


def test_inception_features_come_from_the_file(inception):
    network, path = inception
    extractor = inception_extractor(path)
    some = images(2, 0)[:, :1]
    found = extractor.features(some)
    assert found.shape == (2, 2048)
    assert torch.allclose(found, network(some.expand(-1, 3, -1, -1))[0], atol=1e-5)
    assert extractor.name.startswith("inception:")
    assert len(extractor.name) == len("inception:") + 64


def test_other_inception_weights_are_refused(inception, tmp_path):
    state = load_file(inception[1])
    path = tmp_path / "other.safetensors"
    save_file({**state, "more": torch.zeros(1), "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}, path)
    with pytest.raises(ModelError, match="does not fit Inception") as caught:
        inception_extractor(path)
    assert "more" in str(caught.value)
    assert "Conv2d_1a_3x3.conv.weight" in str(caught.value)
    path.write_bytes(b"no tensors")
    with pytest.raises(IntegrityError, match="damaged"):
        inception_extractor(path)
    with pytest.raises(UsageError, match="does not exist"):
        inception_extractor(tmp_path / "none.safetensors")


def test_a_pickle_is_refused_with_a_command_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.arange(3)}, "weights.pth")
    with pytest.raises(UsageError, match="not a safetensors file") as caught:
        inception_extractor(tmp_path / "weights.pth")
    python, flag, code = shlex.split(caught.value.remedy)
    assert (python, flag) == ("python", "-c")
    exec(code)
    assert torch.equal(load_file("weights.safetensors")["w"], torch.arange(3))
