import pytest
import torch

from salun_core.errors import ModelError, UsageError
from salun_core.models import build_classifier
from salun_core.models.architectures import CLASSIFIERS


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("resnet8", 1, 77_754),
        ("resnet20", 3, 269_722 + 2560 + 192),  # He et al. with 1 x 1 shortcuts
        ("resnet18", 3, 11_173_962),
        ("salun:resnet8", 1, 77_754),
    ],
)
def test_our_own_networks(name, channels, parameters):
    model = build_classifier(name, 10, channels)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 10)
    assert model.training


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name != "vgg16_bn"])
def test_nearly_all_our_networks_map_tiny_images_to_logits(name):
    model = build_classifier(name, 3, 3, 8).eval()
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 3)


def test_depth_counts_the_weighted_layers():
    for depth in (8, 14, 20, 56):
        modules = build_classifier(f"resnet{depth}", 10).named_modules()
        layers = [
            name
            for name, module in modules
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "shortcut" not in name
        ]
        assert len(layers) == depth


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("torchvision:mobilenet_v3_small", 3, 32),
        ("timm:mobilenetv3_small_050", 1, 32),
        ("mobilenetv3_small_050", 3, None),
        ("timm:vit_tiny_patch16_224", 3, 32),
    ],
)
def test_networks_of_other_libraries(name, channels, size):
    model = build_classifier(name, 5, channels, size).eval()
    assert model(torch.randn(2, channels, size or 32, size or 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("resnet19", "did you mean 'resnet18'|did you mean 'resnet1"),
        ("torchvision:resnet19", "did you mean 'resnet1"),
        ("timm:vit_tiny_patch16_225", "did you mean 'vit_tiny_patch16_224'"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
        ("hf-hub:someone/something", "unknown model library 'hf-hub'"),
        ("timm:hf-hub:someone/something", "unknown model library"),
        ("", "unknown architecture ''"),
        ("salun:vit_tiny_patch16_224", "unknown model library 'salun'"),
    ],
)
def test_unknown_names_get_a_suggestion(name, why):
    with pytest.raises(UsageError, match=why) as caught:
        build_classifier(name, 10)
    assert len(str(caught.value)) < 2000 or name.startswith("torchvision")


def test_impossible_sizes_are_refused():
    with pytest.raises(ModelError, match="1 classes"):
        build_classifier("resnet8", 1)
    with pytest.raises(ModelError, match="takes colour images"):
        build_classifier("torchvision:resnet18", 10, 1)
    with pytest.raises(ModelError, match="cannot be built for images of 30 pixels"):
        build_classifier("timm:nest_tiny", 10, 3, 30)
