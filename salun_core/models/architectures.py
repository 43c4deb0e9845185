"""Classifiers by name: the networks of the study, torchvision's models, timm's models, and your own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from salun_core import plugins
from salun_core.errors import ModelError, SalunError, UsageError, unknown_name
from salun_core.models.resnet import DEPTHS, cifar_resnet, padded_cifar_resnet, resnet18
from salun_core.models.transformers import swin_t, vit_tiny
from salun_core.models.vgg import vgg16_bn

Builder = Callable[[int, int, int | None], nn.Module]
"""(classes, channels, side of the images in pixels if known) -> network with fresh weights."""

CLASSIFIERS: dict[str, Builder] = {
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in DEPTHS},
    **{f"resnet{depth}_option_a": partial(padded_cifar_resnet, depth) for depth in DEPTHS},
    "resnet18": resnet18,
    "vgg16_bn": vgg16_bn,
    "swin_t": swin_t,
    "vit_tiny": vit_tiny,
}


def build_classifier(architecture: str, num_classes: int, channels: int = 3, size: int | None = None) -> nn.Module:
    """Build a classifier with fresh weights, in train mode; nothing is downloaded.

    The architecture is a key of `CLASSIFIERS`, `torchvision:NAME`, `timm:NAME`, a timm name without prefix, or
    `package:callable` or the name of a plug-in, which the operator must allow (`salun_core.plugins`). `size` is the
    image side in pixels, for architectures of a fixed size. Raises UsageError for an unknown name, and ModelError if
    the architecture does not support these numbers.
    """
    if num_classes < 2:
        raise ModelError(f"{num_classes} classes are too few", "a classifier needs two or more", "check the data")
    library, _, name = architecture.rpartition(":")
    if library in ("", "salun") and name in CLASSIFIERS:
        return CLASSIFIERS[name](num_classes, channels, size)
    if library == "torchvision":
        return _torchvision(name, num_classes, channels)
    if is_own(architecture):
        return _own(architecture, num_classes)
    if library in ("", "timm"):
        return _timm(name, num_classes, channels, size)
    raise unknown_name("model library", library, ["torchvision", "timm", "package:callable of your own"])


def is_own(architecture: str) -> bool:
    """Whether a name is `package:callable`, or a plug-in offers it."""
    if ":" not in architecture:
        return architecture not in CLASSIFIERS and plugins.find("architecture", architecture) is not None
    return plugins.is_reference(architecture) and not _library_typo(architecture.partition(":")[0])


def _library_typo(package: str) -> bool:
    return bool(difflib.get_close_matches(package, ["torchvision", "timm"], n=1, cutoff=0.75))


def _own(architecture: str, num_classes: int) -> nn.Module:
    """Load and call an architecture of the user's own, after the check that the operator allowed it."""
    if ":" not in architecture and (offer := plugins.find("architecture", architecture)) and _in_timm(architecture):
        raise UsageError(
            f"architecture {architecture} is ambiguous",
            f"{offer.distribution} and timm have one of this name",
            f"write {offer.target} or timm:{architecture}",
        )
    build = plugins.load("architecture", architecture)
    try:
        takes_classes = "num_classes" in inspect.signature(build).parameters
        with plugins.importable_folder():  # it may import more of its package when it is called
            model = build(num_classes=num_classes) if takes_classes else build()
    except (NotImplementedError, SalunError):  # of a build without memory; the caller builds it with memory
        raise
    except Exception as error:  # any code
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"architecture {architecture} cannot be built", why, "correct its code") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"architecture {architecture} is not a network",
            f"it returns a {type(model).__name__}",
            "return an nn.Module",
        )
    return model.train()


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


def _in_timm(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


def _timm(name: str, num_classes: int, channels: int, size: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise unknown_name("architecture", name, [*CLASSIFIERS, *near])
    create = partial(timm.create_model, name, pretrained=False, num_classes=num_classes, in_chans=channels)
    try:
        return create(img_size=size) if size else create()
    except TypeError:
        return create()  # architectures for any size have no img_size
    except (AssertionError, ArithmeticError, ValueError, RuntimeError, KeyError) as error:
        why = str(error).split("\n")[0] or type(error).__name__
        raise ModelError(
            f"{name} cannot be built for images of {size} pixels", why, "set another `size`, or use a residual network"
        ) from error
