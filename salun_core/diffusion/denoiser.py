"""The denoiser: one interface for U-Nets and transformers with any prediction type and any kind of condition."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salun_core.diffusion.conditions import Conditions
from salun_core.diffusion.process import Process
from salun_core.errors import ModelError, UsageError, unknown_name

Selection = Literal["full", "xattn", "noxattn", "selfattn", "text"]
Call = Callable[[Any, Tensor, Tensor, Conditions], Tensor]

_ADDED = ("text_embeds", "time_ids")  # conditions that SDXL takes in a separate dictionary


def _unet_2d(network: Any, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:  # noqa: ANN401 - diffusers'
    return network(noisy, times, class_labels=conditions.get("class_labels"), return_dict=False)[0]  # type: ignore[no-any-return]


def _unet_2d_condition(network: Any, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:  # noqa: ANN401
    text, added = conditions["encoder_hidden_states"], {name: conditions[name] for name in _ADDED if name in conditions}
    return network(noisy, times, text, added_cond_kwargs=added or None, return_dict=False)[0]  # type: ignore[no-any-return]


def _transformer(network: Any, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:  # noqa: ANN401
    """Call DiT, PixArt or SD 3, which take conditions by name; channels of a learned variance are dropped."""
    pixart = _kind(network).startswith("PixArt")
    added = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if pixart else {}
    found: Tensor = network(noisy, timestep=times, return_dict=False, **conditions, **added)[0]
    return found[:, : noisy.shape[1]]


NETWORKS: dict[str, Call] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
    "DiTTransformer2DModel": _transformer,
    "PixArtTransformer2DModel": _transformer,
    "SD3Transformer2DModel": _transformer,
}

# Parameter names by selection. Cross-attention is `attn2` in U-Nets and PixArt. SD 3 has one joint attention `attn`, in
# with separate projections for the text (`add_q_proj`, ...).
_CROSS = re.compile(r"\.attn2\.|\.add_[qkv]_proj\.|\.to_add_out\.")
_SELF = re.compile(r"\.attn1\.|\.attentions\.\d+\.(group_norm|to_[qkv]|to_out)|\.attn\.(to_[qkv]|to_out)")
_CLASSES = re.compile(r"\bclass_embed(ding|der)\b")  # of U-Nets, and of each block of DiT
_OUTER = re.compile(r"^(conv_out|conv_norm_out|time_embedding|time_embed|proj_out|norm_out)\b")


def _kind(network: nn.Module) -> str:
    """Return the name of a network's class, or of the one that it extends: torch makes a subclass to shard it."""
    names = [kind.__name__ for kind in type(network).__mro__]
    return next((name for name in names if name in NETWORKS), names[0])


@dataclass(frozen=True)
class Denoiser:
    """A network and the forward process it was trained for.

    Args:
        network: instance of a class in `NETWORKS`.
        process: its forward process.
    """

    network: nn.Module
    process: Process

    def __post_init__(self) -> None:
        if _kind(self.network) not in NETWORKS:
            raise unknown_name("denoiser", type(self.network).__name__, NETWORKS)

    def predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """Return the network's prediction.

        Args:
            noisy: x_t [B, C, H, W].
            times: int64 [B], from 0 to T - 1.
            conditions: [B, ...] by argument name.

        Returns:
            [B, C, H, W].
        """
        return self.predict_at(noisy, self.process.network_times(times), conditions)

    def predict_at(self, noisy: Tensor, network_times: Tensor, conditions: Conditions) -> Tensor:
        """Return the network's prediction at times in its own units, [B] (see `Process.network_times`)."""
        return NETWORKS[_kind(self.network)](self.network, noisy, network_times, conditions)

    def of(self, network: nn.Module) -> Denoiser:
        """Return the denoiser with another network of the same kind."""
        return replace(self, network=network)

    def with_class_embedding_of(self, other: Denoiser) -> Denoiser | None:
        """Return a copy with the class embedding of another denoiser of this architecture.

        None if there is no such embedding.
        """
        old = dict(other.network.named_parameters())
        names = [name for name, _ in self.network.named_parameters() if _CLASSES.search(name)]
        if not names:
            return None
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for name in names:
                network.get_parameter(name).copy_(old[name])
        return self.of(network)

    def selected(self, selection: Selection) -> list[str]:
        """Return the names of the parameters in a selection; see `selected_parameters`."""
        return selected_parameters(self.network, selection)

    def cross_attentions(self) -> dict[str, nn.Module]:
        """Return the cross-attention layers over text, by name in the network's order.

        Raises:
            UsageError: there are no such layers: conditions are classes, or text and image share one attention (SD 3).
        """
        found = {name: module for name, module in self.network.named_modules() if name.endswith(".attn2")}
        if not found:
            raise UsageError(
                f"{type(self.network).__name__} has no cross-attention",
                "this method changes the attention to a text",
                "choose salun, or esd with selection: noxattn",
            )
        return found


def selected_parameters(network: nn.Module, selection: Selection) -> list[str]:
    """Return the names of the parameters in a selection, in the network's order; `UsageError` if there are none.

    `full`: all. `xattn`: cross-attention. `selfattn`: self-attention. `noxattn`: all but cross-attention, the time
    embedding and the output layers (Gandikota et al., "Erasing Concepts", ICCV 2023: ESD-x and ESD-u). `text`: none,
    because the text encoder is trained in their place.
    """
    if selection == "text":
        return []
    chosen = [name for name, _ in network.named_parameters() if _belongs(name, selection)]
    if not chosen:
        raise UsageError(
            f"selection {selection} is empty",
            f"{type(network).__name__} has no such parameters",
            "choose full, noxattn or another part",
        )
    return chosen


def _belongs(name: str, selection: Selection) -> bool:
    if selection == "full":
        return True
    if selection == "xattn":
        return _CROSS.search(name) is not None
    if selection == "selfattn":
        return _SELF.search(name) is not None and not _CROSS.search(name)
    return _CROSS.search(name) is None and _OUTER.match(name) is None


def require_finite(what: str, values: Tensor) -> Tensor:
    """Return values unchanged; `ModelError` if one is NaN or infinite."""
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise ModelError(f"{what} are not finite", "NaN or infinity was found", "check the weights and the images")
    return values
