"""Each architecture of the classification study, from build to a masked unlearning."""

import math

import pytest
import torch
from torch import nn

from salun_core.data import DataSpec, ImageSet, SplitManifest
from salun_core.errors import ModelError
from salun_core.methods.classification import unlearn
from salun_core.methods.classification.boundary_expanding import last_linear
from salun_core.models import ModelCard, build_classifier, load_model, save_model
from salun_core.models.transformers import swin_patch_and_window, vit_patch
from salun_core.saliency import SaliencyMask, saliency_scores

CLASSES, SIZE = 5, 32
STUDY = ["resnet18", "resnet20", "resnet56", "vgg16_bn", "swin_t", "vit_tiny"]
OF_TIMM = ["timm:swin_tiny_patch4_window7_224", "timm:vit_tiny_patch16_224"]
TRANSFORMERS = ["swin_t", "vit_tiny", *OF_TIMM]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(name, size=SIZE, channels=3):
    torch.manual_seed(0)
    return build_classifier(name, CLASSES, channels, size)


@pytest.fixture(scope="module")
def sets():
    """Images to forget and images to keep."""
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3])
    return ImageSet(images[:2], labels[:2]), ImageSet(images[2:], labels[2:])


@pytest.fixture(scope="module", params=[*STUDY, "timm:vit_tiny_patch16_224"])
def original(request, sets):
    """One network of each kind, in eval mode, with its name; statistics of batch norm are those of a batch."""
    model = built(request.param).to(memory_format=torch.channels_last)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.cat([part.images for part in sets]))
    for norm in norms:
        norm.momentum = 0.1
    return request.param, model.eval()


@pytest.fixture(scope="module")
def scores(original, sets):
    return saliency_scores(original[1], sets[0].batches(2), nn.functional.cross_entropy)


@pytest.fixture(scope="module")
def mask(scores):
    return SaliencyMask.from_scores(scores, 0.5)


def card_of(name, split):
    return ModelCard(
        architecture=name,
        classes=[f"class {index}" for index in range(CLASSES)],
        channels=3,
        height=SIZE,
        width=SIZE,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        data=DataSpec(source="digits"),
        dataset_digest=split.dataset_digest,
        split_digest=split.digest,
    )


def test_a_saved_model_is_rebuilt_from_its_card_alone(original, sets, tmp_path):
    name, model = original
    split = SplitManifest(dataset_digest="0" * 64, train={"a": "1" * 64}, validation={}, test={"b": "2" * 64})
    save_model(tmp_path / "model", model, card_of(name, split), split)
    loaded = load_model(tmp_path / "model")
    images, _ = next(sets[0].batches(2))
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    assert loaded.model(images).shape == (2, CLASSES)


def test_scores_and_mask_cover_every_parameter(original, scores, mask):
    _, model = original
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tuple(score.shape) for name, score in scores.items()} == shapes
    mask.check_fits(shapes)
    assert mask.weights == sum(map(math.prod, shapes.values()))
    assert mask.k == round(0.5 * mask.weights)
    head = last_linear(model, CLASSES)
    name = next(name for name, module in model.named_modules() if module is head)
    assert scores[f"{name}.weight"].gt(0).any()


@pytest.mark.parametrize("batch_norm", ["freeze", "update"])
def test_a_masked_epoch_keeps_the_bits_outside_the_mask(original, sets, mask, batch_norm):
    name, model = original
    if name in TRANSFORMERS and batch_norm == "freeze":
        pytest.skip("it has no batch norm")
    config = {"epochs": 1, "batch_size": 8, "batch_norm": batch_norm, "device": "cpu"}
    after = unlearn(model, "salun", forget=sets[0], retain=sets[1], mask=mask, config=config).model
    before, moved = dict(model.named_parameters()), 0
    for key, parameter in after.named_parameters():
        differs = parameter.detach().view(torch.int32) != before[key].detach().view(torch.int32)
        assert not differs[~mask.tensor(key)].any(), key
        moved += int(differs.sum())
    assert moved > mask.k // 4
    statistics = {key for key, value in model.named_buffers() if not torch.equal(value, after.get_buffer(key))}
    assert bool(statistics) == (batch_norm == "update" and name not in TRANSFORMERS)


def test_boundary_expanding_finds_and_restores_the_head(original, sets):
    name, model = original
    config = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "device": "cpu"}
    after = unlearn(model, "boundary_expanding", forget=sets[0], retain=sets[1], config=config).model
    head = last_linear(after, CLASSES)
    assert head.out_features == CLASSES
    assert {key: value.shape for key, value in after.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert not torch.equal(head.weight, last_linear(model, CLASSES).weight)


def check_transformer(model, size):
    """It takes images of a size, and has no batch norm."""
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, size, size)).shape == (1, CLASSES)
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", OF_TIMM)
@pytest.mark.parametrize("size", [32, 64, 160, 224])
def test_transformers_of_timm_take_the_sizes_of_all_data_sets(name, size):
    check_transformer(built(name, size), size)


@pytest.mark.parametrize(
    ("size", "patch"), [(8, 4), (28, 4), (32, 4), (64, 8), (96, 8), (100, 10), (160, 16), (224, 16)]
)
def test_vits_patch_follows_the_size(size, patch):
    model = built("vit_tiny", size)
    assert vit_patch(size) == patch
    assert model.patch_embed.proj.kernel_size == (patch, patch)
    check_transformer(model, size)


@pytest.mark.parametrize(("size", "patch", "window"), [(32, 2, 4), (64, 2, 4), (160, 4, 5), (224, 4, 7)])
def test_swins_patch_and_window_follow_the_size(size, patch, window):
    model = built("swin_t", size)
    assert swin_patch_and_window(size) == (patch, window)
    assert model.patch_embed.proj.kernel_size == (patch, patch)
    assert model.layers[0].blocks[0].window_size == (window, window)
    assert all(grid % window == 0 for grid in (size // patch, size // patch // 2, size // patch // 4))
    check_transformer(model, size)


@pytest.mark.parametrize("name", ["swin_t", "vit_tiny"])
def test_without_a_size_transformers_are_the_published_ones(name):
    ours = build_classifier(name, CLASSES).state_dict()
    published = built(dict(zip(["swin_t", "vit_tiny"], OF_TIMM, strict=True))[name], 224).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in published.items()}


@pytest.mark.parametrize(("name", "size", "near"), [("vit_tiny", 97, 96), ("vit_tiny", 3, 16), ("swin_t", 33, 32)])
def test_sizes_that_no_patch_divides_are_refused(name, size, near):
    with pytest.raises(ModelError, match=f"{name} cannot be built for images of {size} pixels.*set `size: {near}`"):
        built(name, size)


def test_vgg_has_13_convolutions_and_one_linear_layer():
    model = built("vgg16_bn", channels=1)
    kinds = [type(module) for module in model.modules()]
    assert [kinds.count(kind) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)] == [13, 13, 5, 1]
    assert (model.classifier.in_features, model.classifier.out_features) == (512, CLASSES)
    assert sum(parameter.numel() for parameter in build_classifier("vgg16_bn", 10).parameters()) == 14_728_266
    assert model(torch.randn(2, 1, 64, 33)).shape == (2, CLASSES)


def test_vgg_reports_the_size_it_needs():
    with pytest.raises(ModelError, match="images of 28 pixels: its five poolings need 32.*`size: 32`"):
        built("vgg16_bn", 28)
    with pytest.raises(ModelError, match="images of 31 pixels"):
        built("vgg16_bn", None)(torch.randn(2, 3, 64, 31))
    with pytest.raises(ModelError, match="images of 28 pixels"):
        unlearn(
            built("vgg16_bn"),
            "finetune",
            forget=(torch.randn(1, 3, 28, 28), torch.tensor([0])),
            retain=(torch.randn(1, 3, 28, 28), torch.tensor([1])),
        )


@pytest.mark.parametrize("name", STUDY)
def test_grey_images_are_accepted(name):
    assert built(name, channels=1).eval()(torch.randn(1, 1, SIZE, SIZE)).shape == (1, CLASSES)


@pytest.mark.parametrize("name", STUDY)
def test_logits_of_fresh_weights_are_of_a_trainable_size(name):
    model = built(name).train()
    logits = model(torch.randn(8, 3, SIZE, SIZE))
    loss = nn.functional.cross_entropy(logits, torch.arange(8) % CLASSES)
    assert 0.5 * math.log(CLASSES) < loss.item() < 3 * math.log(CLASSES)
