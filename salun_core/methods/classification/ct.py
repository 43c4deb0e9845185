"""Convolution transpose (CT): mirror every kernel at its diagonal, then train on the retain set.

    W[o, i, a, b] <- W[o, i, b, a]    in each convolution with square kernels;    then min_θ CE(D_r)

The kernels keep their norm and respond to other patterns, so the outputs change for every image. Fine-tuning recovers
what D_r supports. D_f is not used.

Source: an entry of the NeurIPS 2023 unlearning challenge; named and measured in Cadet et al., "Deep Unlearn:
Benchmarking Machine Unlearning", 2024. Deviations: docs/research/deviations.md, row `ct`.
"""

from __future__ import annotations

import torch
from torch import nn

from salun_core.errors import ModelError
from salun_core.methods.classification import finetune
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod
from salun_core.methods.config import DrawingConfig


@torch.no_grad()
def begin(context: ClassifierContext[DrawingConfig]) -> ClassifierContext[DrawingConfig]:
    """Transpose the kernels in place; a resumed run begins at θ_o too.

    A model without a kernel that a transposition changes is a `ModelError`.
    """
    assert context.model is not None
    kernels = [m.weight for m in context.model.modules() if isinstance(m, nn.Conv2d)]
    square = [kernel for kernel in kernels if kernel.requires_grad and kernel.shape[2] == kernel.shape[3] > 1]
    if not square:
        raise ModelError(
            "the model has no kernel to transpose",
            "CT needs two-dimensional convolutions with square kernels of at least 2 pixels",
            "use another method",
        )
    for kernel in square:
        kernel.copy_(kernel.transpose(2, 3).clone())  # a copy first: source and target overlap
    return context


# Batch norm is updated by default: the statistics of θ_o are not those of the transposed kernels.
METHOD = ClassifierMethod(
    finetune.phases,
    config_type=DrawingConfig,
    about="transposes the kernels of convolutions, then trains on D_r",
    source='the NeurIPS 2023 unlearning challenge; Cadet et al., "Deep Unlearn", 2024',
    defaults={"learning_rate": 0.01, "schedule": "cosine", "batch_norm": "update"},
    needs="square kernels",
    begin=begin,
)
