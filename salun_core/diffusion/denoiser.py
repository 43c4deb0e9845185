"""The denoiser: one interface for U-Nets and transformers, whatever they predict and are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salun_core.diffusion.conditions import Conditions
from salun_core.diffusion.process import Process
from salun_core.errors import ModelError, UsageError, unknown_name

Selection = Literal["full", "xattn", "noxattn", "selfattn"]
Call = Callable[[Any, Tensor, Tensor, Conditions], Tensor]

_EXTRA = ("text_embeds", "time_ids")  # SDXL hands these over in a dict of their own


def _unet_2d(network: Any, noisy: Tensor, times: Tensor, told: Conditions) -> Tensor:  # noqa: ANN401 - diffusers' modules
    return network(noisy, times, class_labels=told.get("class_labels"), return_dict=False)[0]  # type: ignore[no-any-return]


def _unet_2d_condition(network: Any, noisy: Tensor, times: Tensor, told: Conditions) -> Tensor:  # noqa: ANN401
    extra = {name: told[name] for name in _EXTRA if name in told}
    found = network(
        noisy,
        times,
        encoder_hidden_states=told["encoder_hidden_states"],
        added_cond_kwargs=extra or None,
        return_dict=False,
    )
    return found[0]  # type: ignore[no-any-return]


def _transformer(network: Any, noisy: Tensor, times: Tensor, told: Conditions) -> Tensor:  # noqa: ANN401
    """DiT, PixArt and SD 3 take what they are told by name; a learned variance is cut off."""
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if _is_pixart(network) else {}
    found: Tensor = network(noisy, timestep=times, return_dict=False, **told, **extra)[0]
    return found[:, : noisy.shape[1]]


def _is_pixart(network: Any) -> bool:  # noqa: ANN401
    return type(network).__name__.startswith("PixArt")


NETWORKS: dict[str, Call] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
    "DiTTransformer2DModel": _transformer,
    "PixArtTransformer2DModel": _transformer,
    "SD3Transformer2DModel": _transformer,
}

# By selection: which names are meant. Cross-attention is `attn2` in U-Nets and PixArt; SD 3 joins both kinds in `attn`,
# where the text's side has projections of its own (`add_q_proj`, ...).
_CROSS = re.compile(r"\.attn2\.|\.add_[qkv]_proj\.|\.to_add_out\.")
_SELF = re.compile(r"\.attn1\.|\.attentions\.\d+\.(group_norm|to_[qkv]|to_out)|\.attn\.(to_[qkv]|to_out)")
_OUTER = re.compile(r"^(conv_out|conv_norm_out|time_embedding|time_embed|proj_out|norm_out)\b")


@dataclass(frozen=True)
class Denoiser:
    """A network with the process it was trained for.

    Args:
        network: one of `NETWORKS`, by its class's name.
        process: its forward process.
    """

    network: nn.Module
    process: Process

    def __post_init__(self) -> None:
        if type(self.network).__name__ not in NETWORKS:
            raise unknown_name("denoiser", type(self.network).__name__, NETWORKS)

    def predict(self, noisy: Tensor, times: Tensor, told: Conditions) -> Tensor:
        """Return the network's prediction.

        Args:
            noisy: x_t [B, C, H, W].
            times: int64 [B], from 0 to T - 1.
            told: conditions [B, ...] by argument name.

        Returns:
            [B, C, H, W].
        """
        return self.ask(noisy, self.process.network_times(times), told)

    def ask(self, noisy: Tensor, network_times: Tensor, told: Conditions) -> Tensor:
        """Return the network's prediction at times as it takes them itself, [B] (see `Process.network_times`)."""
        return NETWORKS[type(self.network).__name__](self.network, noisy, network_times, told)

    def of(self, network: nn.Module) -> Denoiser:
        """Return the denoiser with another network of the same kind."""
        return replace(self, network=network)

    def selected(self, selection: Selection) -> list[str]:
        """Return the names of the parameters that a selection means, in the network's order.

        `full`: all. `xattn`: cross-attention. `selfattn`: self-attention. `noxattn`: all but cross-attention, the
        time embedding and the output layers (Gandikota et al., "Erasing Concepts", ICCV 2023: ESD-x and ESD-u).

        Raises:
            UsageError: the network has none of that kind.
        """
        names = [name for name, _ in self.network.named_parameters()]
        chosen = [name for name in names if _belongs(name, selection)]
        if not chosen:
            raise UsageError(
                f"selection {selection} is empty",
                f"{type(self.network).__name__} has no such parameters",
                "choose full, noxattn or another part",
            )
        return chosen

    def cross_attentions(self) -> dict[str, nn.Module]:
        """Return the cross-attention layers over a text by name, in the network's order.

        Raises:
            UsageError: it has none: it is told classes, or it joins text and image in one attention (SD 3).
        """
        found = {name: module for name, module in self.network.named_modules() if name.endswith(".attn2")}
        if not found:
            raise UsageError(
                f"{type(self.network).__name__} has no cross-attention",
                "this method changes how a text is attended to",
                "choose salun, or esd with selection: noxattn",
            )
        return found


def _belongs(name: str, selection: Selection) -> bool:
    if selection == "full":
        return True
    if selection == "xattn":
        return _CROSS.search(name) is not None
    if selection == "selfattn":
        return _SELF.search(name) is not None and not _CROSS.search(name)
    return _CROSS.search(name) is None and _OUTER.match(name) is None


def require_finite(what: str, values: Tensor) -> Tensor:
    """Return values unchanged.

    Raises:
        ModelError: one is NaN or infinite.
    """
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise ModelError(f"{what} are not finite", "NaN or infinity was found", "check the weights and the images")
    return values
