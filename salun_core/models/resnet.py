"""CIFAR-style residual networks (He et al., 2016, section 4.2) and ResNet-18 with a CIFAR stem."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTHS = (8, 14, 20, 32, 44, 56, 110)


class PaddedShortcut(nn.Module):
    """The shortcut without weights (He et al., 2016, option A): every second pixel, and channels of zeros.

    Half of the new channels come before those of the input and half after them, as in published checkpoints.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / 2, W / 2]."""
        return nn.functional.pad(images[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    If the shape changes, the shortcut is a 1 x 1 convolution (option B of the paper) or, if `padded`, it has no weights
    (option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if padded and stride != 1:
            self.shortcut = PaddedShortcut(inputs, outputs)
        elif stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        hidden = torch.relu(self.bn1(self.conv1(images)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class ResNet(nn.Module):
    """A residual network for small images: a 3 x 3 stem without pooling, stages that halve the size.

    `widths` and `blocks` give the channels and the number of residual blocks of each stage. If `padded`, shortcuts are
    padded with zeros instead of convolved.
    """

    def __init__(
        self, widths: tuple[int, ...], blocks: int, num_classes: int, channels: int, padded: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            first = BasicBlock(inputs, width, stride=2 if stage else 1, padded=padded)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, num_classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to logits [B, num_classes]."""
        hidden = self.stages(torch.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def cifar_resnet(depth: int, num_classes: int, channels: int, size: int | None = None) -> ResNet:
    """Build a CIFAR-style ResNet-`depth`: 6n + 2 layers, widths 16, 32, 64, any image size."""
    return ResNet((16, 32, 64), (depth - 2) // 6, num_classes, channels)


def padded_cifar_resnet(depth: int, num_classes: int, channels: int, size: int | None = None) -> ResNet:
    """Build a CIFAR-style ResNet-`depth` whose shortcuts have no weights (option A), as in the paper."""
    return ResNet((16, 32, 64), (depth - 2) // 6, num_classes, channels, padded=True)


def resnet18(num_classes: int, channels: int, size: int | None = None) -> ResNet:
    """Build ResNet-18 with a CIFAR stem, as in the paper: 11.2 M parameters, widths 64 to 512, any image size."""
    return ResNet((64, 128, 256, 512), 2, num_classes, channels)
