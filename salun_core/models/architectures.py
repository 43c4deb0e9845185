"""Classifiers by name: those of the classification study, torchvision's models, any timm model."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from salun_core.errors import ModelError, unknown_name
from salun_core.models.resnet import DEPTHS, cifar_resnet, resnet18
from salun_core.models.transformers import swin_t, vit_tiny
from salun_core.models.vgg import vgg16_bn

Builder = Callable[[int, int, int | None], nn.Module]
"""(classes, channels, side of the images in pixels if known) -> fresh weights."""

CLASSIFIERS: dict[str, Builder] = {
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in DEPTHS},
    "resnet18": resnet18,
    "vgg16_bn": vgg16_bn,
    "swin_t": swin_t,
    "vit_tiny": vit_tiny,
}


def build_classifier(architecture: str, num_classes: int, channels: int = 3, size: int | None = None) -> nn.Module:
    """Build a classifier with fresh weights; none are downloaded.

    Args:
        architecture: a name of `CLASSIFIERS`, `torchvision:NAME`, or `timm:NAME`; a bare name that only timm has
            is taken from there.
        num_classes: outputs, at least 2.
        channels: of the images.
        size: side of the images in pixels, for architectures that are built for one size.

    Returns:
        The module, in train mode.

    Raises:
        UsageError: no architecture of that name (with the nearest match).
        ModelError: it cannot be built with these numbers.
    """
    if num_classes < 2:
        raise ModelError(
            f"{num_classes} classes cannot be classified", "a classifier needs two or more", "check the data"
        )
    library, _, name = architecture.rpartition(":")
    if library in ("", "salun") and name in CLASSIFIERS:
        return CLASSIFIERS[name](num_classes, channels, size)
    if library == "torchvision":
        return _torchvision(name, num_classes, channels)
    if library in ("", "timm"):
        return _timm(name, num_classes, channels, size)
    raise unknown_name("model library", library, ["torchvision", "timm"])


def _torchvision(name: str, num_classes: int, channels: int) -> nn.Module:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise unknown_name("torchvision model", name, names)
    if channels != 3:
        raise ModelError(
            f"torchvision's {name} takes colour images", f"the data have {channels} channel", "set `channels: 3`"
        )
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _timm(name: str, num_classes: int, channels: int, size: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise unknown_name("architecture", name, [*CLASSIFIERS, *near])
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    try:
        return _create_timm(name, **options, **({"img_size": size} if size else {}))
    except TypeError:
        return _create_timm(name, **options)  # an architecture that takes any size has no img_size
    except (AssertionError, ArithmeticError, ValueError, RuntimeError, KeyError) as error:
        why = str(error).split("\n")[0] or type(error).__name__
        raise ModelError(
            f"{name} cannot be built for images of {size} pixels", why, "set another `size`, or take a residual network"
        ) from error


def _create_timm(name: str, **options: Any) -> nn.Module:  # noqa: ANN401 - passed on to timm
    import timm

    return timm.create_model(name, pretrained=False, **options)
