"""VGG-16 with batch norm for small images (Simonyan & Zisserman, 2015, configuration D)."""

from __future__ import annotations

from torch import Tensor, nn

from salun_core.errors import ModelError

MIN_SIZE = 32  # five poolings halve the images down to one pixel
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with batch norm, each followed by a pooling that halves the size; one linear layer.

    The output of the last stage is averaged to one pixel. Convolutions have a bias, and layers are named `features.N`
    and `classifier`, because published CIFAR checkpoints of this network have both. `stages` lists the output channels
    of each convolution, by stage.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for widths in stages:
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] of at least 32 pixels to logits [B, num_classes]."""
        require_size(min(images.shape[2:]))
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


def require_size(size: int) -> None:
    """Raise ModelError if the shorter side of the images is below 32 pixels."""
    if size < MIN_SIZE:
        raise ModelError(
            f"vgg16_bn cannot be built for images of {size} pixels",
            f"its five poolings need {MIN_SIZE}",
            f"set `size: {MIN_SIZE}` in the data spec, or use a residual network",
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def vgg16_bn(num_classes: int, channels: int, size: int | None = None) -> VGG:
    """Build VGG-16 with batch norm: 13 convolutions and one linear layer, 14.7 M parameters; at least 32 pixels."""
    if size is not None:
        require_size(size)
    return VGG(STAGES, num_classes, channels)
