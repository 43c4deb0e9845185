"""Random labelling (RL): train the forget set towards wrong labels and the retain set towards the true ones.

    min_θ  E_{x in D_f} CE(f_θ(x), y')  +  E_{(x, y) in D_r} CE(f_θ(x), y),    y' uniform over the classes != y

The labels y' are redrawn in each epoch.

Source: Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020; as the baseline of Fan et al., ICLR 2024.
Deviations: docs/research/deviations.md, row "wrong labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod
from salun_core.methods.config import DrawingConfig
from salun_core.methods.loop import Phase


class RandomLabelConfig(DrawingConfig):
    """Settings of random labelling, and of SalUn."""

    order: Literal["sequential", "mixed"] = Field(
        default="sequential",
        description="each epoch all of the forget set, then all of the retain set; or both shuffled together",
    )


def wrong_labels(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Draw a wrong label for each label, int64 [N], uniform over the other classes, with a CPU generator."""
    shift = torch.randint(1, num_classes, (len(labels),), generator=generator).to(labels.device)
    return (labels + shift) % num_classes


def phases(context: ClassifierContext[RandomLabelConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_f under wrong labels, then D_r; or both shuffled together."""
    wrong = context.forget.relabelled(wrong_labels(context.forget.labels, context.num_classes, generator))
    if context.config.order == "mixed":
        return [context.phase("mixed", wrong.joined(context.retain))]
    return [context.phase("forget", wrong), context.phase("retain", context.retain)]


METHOD = ClassifierMethod(
    phases,
    config_type=RandomLabelConfig,
    about="trains D_f towards wrong labels, D_r towards its own",
    source="Golatkar et al., CVPR 2020",
    grows=True,
    shardable=True,
)
