"""Fine-tuning (FT): go on training on the retain set and hope that the rest is forgotten.

    min_θ  E_{(x, y) in D_r} CE(f_θ(x), y),    starting at θ_o

Source: Warnecke et al., 2021; Golatkar et al., CVPR 2020; as the baseline of Fan et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from salun_core.methods.classification.method import Method, Part, Task


def parts(task: Task, generator: torch.Generator) -> Sequence[Part]:
    """Return one epoch: D_r."""
    return [Part("retain", task.retain)]


METHOD = Method(parts)
