"""Full-size architectures by name: their published configurations, without weights.

On the meta device, a network has names and shapes but takes no memory. This is enough to determine parameter names,
selections, mask sizes and step costs without any weights.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from torch import nn

from salun_core.errors import UsageError, unknown_name

_CLASS = "_class_name"


def architecture_names() -> list[str]:
    """Return the architecture names in alphabetical order."""
    suffix = ".json"
    files = (item.name for item in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(suffix) for name in files if name.endswith(suffix))


def architecture_config(name: str) -> dict[str, Any]:
    """Return the published configuration of an architecture: keyword arguments, and the class name as `_class_name`.

    UsageError suggests the nearest match of an unknown name.

    Source:
        Stable Diffusion 1.4 and 2.1: Rombach et al., CVPR 2022. SDXL: Podell et al., ICLR 2024. The DDPM for CIFAR-10:
        Ho et al., NeurIPS 2020, with ten classes and a null class as SalUn trains it (Fan et al., ICLR 2024).
    """
    if name not in architecture_names():
        raise unknown_name("architecture", name, architecture_names())
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def build_architecture(name: str, device: torch.device | str = "meta") -> nn.Module:
    """Build an architecture in eval mode, with fresh weights unless on meta, which takes neither memory nor time."""
    config = architecture_config(name)
    try:
        with torch.device(device):
            return _build(config.pop(_CLASS), config).eval()
    except ImportError as error:
        raise UsageError(
            f"architecture {name} cannot be built", str(error).splitlines()[0], "pip install 'salun[diffusion]'"
        ) from error


def _build(kind: str, config: dict[str, Any]) -> nn.Module:
    if kind == "CLIPTextModel":
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**config))
    import diffusers

    return getattr(diffusers, kind).from_config(config)  # type: ignore[no-any-return]
