"""Swin-T and ViT-Tiny (timm's) with patches that fit the size of the images.

The published transformers expect 224 pixels. At 32 pixels, Swin-T would get 64 of its patches and ViT-Tiny 4. Here
the size alone determines the patch, so a model card can rebuild the network without other settings. Do not change the
rules: existing cards rely on them.

Sources: Liu et al., "Swin Transformer", ICCV 2021; Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021;
Touvron et al., 2021, for the tiny width.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from salun_core.errors import ModelError

PUBLISHED_SIZE = 224
_GRID = 14  # side of the published ViT's patch grid
_WINDOW = 7  # window of the published Swin
_SWIN_COARSE = 128  # from this size on, Swin-T uses its published patch of 4 pixels


def vit_tiny(num_classes: int, channels: int, size: int | None = None) -> nn.Module:
    """Build ViT-Tiny: 12 layers, width 192, 5.4 M parameters at 32 pixels; `size` is in pixels, and None means 224."""
    size = size or PUBLISHED_SIZE
    return _timm("vit_tiny_patch16_224", num_classes, channels, size, patch_size=vit_patch(size))


def swin_t(num_classes: int, channels: int, size: int | None = None) -> nn.Module:
    """Build Swin-T: stages of 2, 2, 6 and 2 layers, widths 96 to 768, 27.5 M parameters.

    `size` is in pixels and even; None means 224.
    """
    size = size or PUBLISHED_SIZE
    patch, window = swin_patch_and_window(size)
    name = "swin_tiny_patch4_window7_224"
    return _timm(name, num_classes, channels, size, patch_size=patch, window_size=window)


def vit_patch(size: int) -> int:
    """Return the patch side: the smallest divisor of the size, at least 4, that gives at most 14 x 14 patches.

    Raises ModelError if the only such divisor is the size itself.
    """
    patch = next(side for side in range(4, size + 4) if size % side == 0 and size // side <= _GRID or side >= size)
    if patch >= size:
        raise _no_patch("vit_tiny", size, 16)
    return patch


def swin_patch_and_window(size: int) -> tuple[int, int]:
    """Return the patch side in pixels, and the side of an attention window in patches.

    The window is the largest, up to 7, that divides the grids of the first three stages, so that nothing is padded.
    Raises ModelError if the patch does not divide the size.
    """
    patch = 4 if size >= _SWIN_COARSE else 2
    if size % patch:
        raise _no_patch("swin_t", size, patch)
    third = size // patch // 4
    return patch, next((side for side in range(_WINDOW, 3, -1) if third % side == 0), 4)


def _no_patch(name: str, size: int, multiple: int) -> ModelError:
    near = max(1, round(size / multiple)) * multiple
    return ModelError(
        f"{name} cannot be built for images of {size} pixels",
        "no patch divides them evenly",
        f"set `size: {near}` in the data spec",
    )


def _timm(name: str, num_classes: int, channels: int, size: int, **options: Any) -> nn.Module:  # noqa: ANN401 - passed on to timm
    import timm

    model: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=channels, img_size=size, **options
    )
    return model
