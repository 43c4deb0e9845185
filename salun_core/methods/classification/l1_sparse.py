"""l1-sparse: fine-tuning on the retain set with a penalty that drives weights towards zero.

    min_θ  E_{(x, y) in D_r} CE(f_θ(x), y)  +  γ_e ||θ||_1,    γ_e = γ (1 - e / E) in epoch e of E

γ is `l1_strength`. The norm is over all parameters, and its subgradient at 0 is 0.

Source: Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023; as the baseline of Fan et al.,
ICLR 2024. Deviations: docs/research/deviations.md, row `l1_sparse`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.methods.classification.method import (
    ClassifierContext,
    ClassifierMethod,
    classification_loss,
)
from salun_core.methods.config import DrawingConfig
from salun_core.methods.loop import Phase


class L1SparseConfig(DrawingConfig):
    """Fine-tuning with γ."""

    l1_strength: float = Field(
        default=5e-5, ge=0, allow_inf_nan=False, description="γ of the first epoch; it falls linearly"
    )


def phases(context: ClassifierContext[L1SparseConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: D_r with the penalty of this epoch."""
    gamma = context.config.l1_strength * (1 - context.epoch / context.config.epochs)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        norm = torch.stack([parameter.abs().sum() for parameter in model.parameters()]).sum()
        return classification_loss(model, images, labels) + gamma * norm

    return [context.phase("retain", context.retain, loss)]


METHOD = ClassifierMethod(
    phases,
    config_type=L1SparseConfig,
    about="continues training on D_r, with a penalty on magnitudes",
    source='Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023',
    defaults={"learning_rate": 0.01},
    search={"l1_strength": (1e-6, 1e-3, True)},
)
