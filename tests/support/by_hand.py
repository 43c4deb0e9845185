"""A linear classifier and a small network for the tests of single methods, and the same mathematics in numpy."""

import numpy as np
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.methods.classification import METHODS, unlearn

RATE = 0.1
PLAIN = {
    "learning_rate": RATE,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "batch_size": 64,
    "epochs": 1,
    "augment": False,
    "batch_norm": "freeze",
    "schedule": "constant",
    "gradient_clip": None,
    "device": "cpu",
}


def linear(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()


def pair(count, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, 2, generator=generator), torch.randint(0, classes, (count,), generator=generator)


FORGET, RETAIN = pair(7, 1), pair(20, 2)


def run(method, model=None, forget=FORGET, retain=RETAIN, **config):
    extra = {key: config.pop(key) for key in ("checkpoint", "on_epoch", "mask", "held_out") if key in config}
    settings = METHODS[method].config_type(**{**PLAIN, **config})
    return unlearn(model or linear(), method, forget=forget, retain=retain, config=settings, **extra)


def weights(model):
    """Weight and bias of the linear model, float64 [K, 13]."""
    layer = model[1]
    return np.hstack([layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()[:, None]])


def inputs(images):
    """Flat images with a 1 for the bias, float64 [N, 13]."""
    return np.hstack([images.flatten(1).double().numpy(), np.ones((len(images), 1))])


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def losses(theta, images, labels):
    """Cross-entropy of each sample, [N]."""
    p = softmax(inputs(images) @ theta.T)
    return -np.log(p[np.arange(len(labels)), labels.numpy()])


def gradients(theta, images, labels):
    """Gradient of each sample's cross-entropy, [N, K, 13]."""
    x = inputs(images)
    error = softmax(x @ theta.T) - np.eye(len(theta))[labels.numpy()]
    return error[:, :, None] * x[:, None, :]


class Net(nn.Module):
    """Convolution, batch norm, dropout and a linear head."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, classes)

    def forward(self, images):
        return self.head(self.drop(torch.relu(self.norm(self.conv(images)))).mean(dim=(2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def image_set(count, seed):
    """Images of 256 levels that are normalised and augmented."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 9, 9), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return ImageSet(pixels, labels, Normalisation((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)), "crop-flip")


@torch.no_grad()
def unrecognised(model, count, seed):
    """Images that the model takes for another class: for the target of LoTUS, nothing is recognised."""
    images = image_set(count, seed)
    found = model.eval()(next(images.batches(count))[0]).argmax(1)
    return images.relabelled((found + 1) % 4)
