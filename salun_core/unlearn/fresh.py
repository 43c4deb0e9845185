"""Fresh weights for a model whose builder is not at hand."""

from __future__ import annotations

import torch
from torch import nn

from salun_core.errors import ModelError


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """Initialise every layer of a model anew, in place, as torch's layers do by themselves.

    Args:
        model: each module that owns parameters must have `reset_parameters`.
        seed: of the draw.

    Returns:
        The same model.

    Raises:
        ModelError: a module has parameters and no `reset_parameters`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ModelError(
                    f"{name or 'the model'} cannot be initialised anew", "it has no reset_parameters", "give `fresh`"
                )
    return model
