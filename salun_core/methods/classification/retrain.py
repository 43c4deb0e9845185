"""Retrain: train fresh weights on the retain set alone, which is exact unlearning.

    min_θ  E_{(x, y) in D_r} CE(f_θ(x), y),    starting at fresh weights

It uses the recipe of the base model: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4. The rate is
divided by 10 at half and at three quarters of the run.

Source: Fan et al., ICLR 2024, appendix.
"""

from __future__ import annotations

from salun_core.methods.classification import finetune
from salun_core.methods.classification.method import ClassifierMethod

METHOD = ClassifierMethod(
    finetune.phases,
    about="trains fresh weights on D_r: exact",
    source="Fan et al., ICLR 2024, appendix",
    fresh_start=True,
    defaults={"epochs": 182, "learning_rate": 0.1, "schedule": "step", "batch_norm": "update"},
    needs="time",
)
