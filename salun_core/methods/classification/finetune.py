"""Fine-tuning (FT): continue training on the retain set, so that the model may forget the rest.

    min_θ  E_{(x, y) in D_r} CE(f_θ(x), y),    starting at θ_o

Source: Warnecke et al., 2021; Golatkar et al., CVPR 2020; as the baseline of Fan et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod
from salun_core.methods.config import DrawingConfig, UnlearnConfig
from salun_core.methods.loop import Phase


def phases(context: ClassifierContext[UnlearnConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_r."""
    return [context.phase("retain", context.retain)]


METHOD = ClassifierMethod(
    phases,
    config_type=DrawingConfig,
    about="continues training on D_r",
    source="Warnecke et al., 2021; Golatkar et al., CVPR 2020",
    grows=True,
    shardable=True,
)
