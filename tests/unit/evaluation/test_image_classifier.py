"""The image classifier against the data path of its training, PIL and plain loops."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from salun_core.data import load_data
from salun_core.data.images import fitted
from salun_core.errors import DataError, ModelError
from salun_core.evaluation.image_classifier import ImageClassifier
from salun_core.models import load_model


@pytest.fixture(scope="module")
def loaded(digits_model):
    return load_model(digits_model)


@pytest.fixture(scope="module")
def digits(loaded):
    """Test images, uint8 [N, 1, 8, 8], with labels."""
    return load_data(loaded.card.data).images("test", loaded.normalisation)


def test_predictions_are_the_classifiers_one_image_at_a_time(loaded, digits):
    classifier = ImageClassifier.of(loaded)
    expected = [int(loaded.model(loaded.normalisation.apply(image[None])).argmax()) for image in digits.images]
    found = classifier.predict(digits.images)
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    assert (found == digits.labels).float().mean() > 0.9
    assert classifier.classes == loaded.card.classes
    assert classifier.digest == loaded.digest


def test_colour_and_size_of_generated_images_do_not_change_the_class(loaded, digits):
    classifier = ImageClassifier.of(loaded)
    plain = classifier.predict(digits.images)
    grey = digits.images.expand(-1, 3, -1, -1)
    assert torch.equal(classifier.predict(grey), plain)
    large = grey.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert (classifier.predict(large) == plain).float().mean() > 0.9


def test_luma_is_pils():
    images = torch.randint(0, 256, (6, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = [np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    found = fitted(images, 1, 9, 7)[:, 0].numpy()
    assert np.abs(found.astype(int) - np.array(expected).astype(int)).max() <= 1
    assert torch.equal(fitted(found_ := fitted(images, 1, 9, 7), 3, 9, 7), found_.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("size", [(40, 40), (30, 56), (8, 8)])
def test_resizing_is_pils_bilinear_and_a_centre_crop(size):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (1, 3, *size), generator=generator, dtype=torch.uint8)
    pil = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    scale = 16 / min(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    pil = pil.resize((width, height), Image.Resampling.BILINEAR)
    top, left = (height - 16) // 2, (width - 16) // 2
    expected = np.array(pil.crop((left, top, left + 16, top + 16))).astype(int)
    found = fitted(image, 3, 16, 16)
    assert found.dtype == torch.uint8
    assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_images_that_fit_are_unchanged(loaded, digits):
    kept = digits.images.clone()
    assert fitted(digits.images, 1, 8, 8) is digits.images
    ImageClassifier.of(loaded).predict(digits.images)
    assert torch.equal(digits.images, kept)


def test_features_are_what_the_last_layer_turns_into_logits(loaded, digits):
    features = ImageClassifier.of(loaded).features(digits.images[:300])
    head = [module for module in loaded.model.modules() if isinstance(module, nn.Linear)][-1]
    assert features.shape == (300, head.in_features)
    assert features.dtype == torch.float32
    logits = loaded.model(loaded.normalisation.apply(digits.images[:300]))
    torch.testing.assert_close(head(features), logits, rtol=1e-4, atol=1e-4)
    assert not head._forward_pre_hooks


def test_modes_are_kept_and_statistics_untouched(loaded, digits):
    model = copy.deepcopy(loaded.model).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classifier = ImageClassifier(model, loaded.card, "d")
    assert torch.equal(classifier.predict(digits.images), ImageClassifier.of(loaded).predict(digits.images))
    classifier.features(digits.images[:5])
    assert model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_no_images_give_empty_results(loaded):
    classifier = ImageClassifier.of(loaded)
    none = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert classifier.predict(none).shape == (0,)
    assert classifier.features(none).shape[0] == 0


def test_invalid_images_and_weights_are_refused(loaded, digits):
    classifier = ImageClassifier.of(loaded)
    for bad in (digits.images.float(), digits.images[0], torch.zeros(2, 4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DataError, match="images"):
            classifier.predict(bad)
    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        broken.fc.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        ImageClassifier(broken, loaded.card, "d").predict(digits.images[:3])


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return x.flatten(1)[:, :2]


@pytest.mark.parametrize("model", [nn.Flatten(), Unused()])
def test_a_model_without_a_used_linear_layer_has_no_features(loaded, digits, model):
    with pytest.raises(ModelError, match="no penultimate features"):
        ImageClassifier(model, loaded.card, "d").features(digits.images[:3])
