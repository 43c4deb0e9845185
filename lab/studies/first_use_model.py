"""Makes what a first user brings along: images in class folders, and a checkpoint trained on them elsewhere.

    python lab/studies/first_use_model.py

Writes into the working folder:

- `images/train/1` to `images/train/6`, and `images/test/1` to `6`: some of scikit-learn's handwritten digits as colour
  PNG files of 8 x 8 pixels. The class names look like numbers, and no class has the index of its name.
- `resnet20.th`: a ResNet-20 as the CIFAR ResNets of github.com/akamaster/pytorch_resnet_cifar10 are published: a dict
  with `state_dict` and `best_prec1`, names that begin with `module.`, shortcuts without weights (option A of He et al.,
  2016), no `num_batches_tracked`.

With an ONNX file it measures how many of these images that file names rightly, by class:

    python lab/studies/first_use_model.py new.onnx

It feeds the file as the file's own metadata say. Nothing here uses salun. Trains for a few seconds on one core.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

CLASSES = (1, 2, 3, 4, 5, 6)
PER_CLASS, TEST_SHARE, SIDE = 120, 5, 8  # images; every fifth image is for the test; pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the normalisation of that repository
EPOCHS, BATCH, LEARNING_RATE = 8, 32, 0.05


class Block(nn.Module):
    """Two convolutions and a shortcut without weights, which pads the channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        shortcut = images[:, :, :: self.stride, :: self.stride]
        shortcut = pad(shortcut, (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        hidden = torch.relu(self.bn1(self.conv1(images)))
        return torch.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, 6]."""
        hidden = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(images))))))
        return self.linear(avg_pool2d(hidden, hidden.shape[3]).flatten(1))


def write_images() -> tuple[Tensor, Tensor]:
    """Write the folders; return the training images, uint8 [N, 3, H, W], and their labels."""
    digits, generator = load_digits(), np.random.default_rng(0)
    pixels, labels = [], []
    for label, name in enumerate(CLASSES):
        for number, grey in enumerate(digits.images[digits.target == name][:PER_CLASS]):
            ink, paper = generator.integers(0, 90, 3), generator.integers(160, 256, 3)
            image = Image.fromarray((paper + (ink - paper) * grey[..., None] / 16).astype(np.uint8))
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            part = "test" if number % TEST_SHARE == 0 else "train"
            file = Path("images") / part / str(name) / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            if part == "train":
                pixels.append(np.asarray(image))
                labels.append(label)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """Train the network on all images."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    inputs = (images / 255 - mean) / std
    model = ResNet20()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(inputs[index]), labels[index]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def measure(file: str) -> None:
    """Print which share of the training images of each class an ONNX file names rightly."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    facts = session.get_modelmeta().custom_metadata_map
    classes, fed = json.loads(facts["classes"]), json.loads(facts["preprocessing"])
    for name in map(str, CLASSES):
        files = sorted(Path("images/train", name).iterdir())
        pixels = np.stack([np.asarray(Image.open(path)) for path in files]).astype(np.float32)
        images = ((pixels * fed["scale"] - fed["mean"]) / fed["std"]).transpose(0, 3, 1, 2).astype(np.float32)
        found = session.run(None, {"image": images})[0].argmax(1)
        print(f"class {name}  {np.mean([classes[index] == name for index in found]):4.0%} of {len(files)} images")


def make() -> None:
    """Write the images and the checkpoint."""
    torch.manual_seed(0)
    images, labels = write_images()
    model = train(images, labels)
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": state, "best_prec1": 99.0}, "resnet20.th")
    print(f"images       {len(labels)} for training, in folders named 1 to 6")
    print("resnet20.th  a ResNet-20 that was trained on them")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else make()
