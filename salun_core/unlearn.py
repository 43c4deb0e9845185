"""Unlearning of classifiers: the public names `METHODS` and `unlearn`."""

from salun_core.methods.classification import (
    METHODS,
    FileCheckpoint,
    UnlearnConfig,
    UnlearnResult,
    method_config,
    pick_device,
    unlearn,
)

__all__ = ["METHODS", "FileCheckpoint", "UnlearnConfig", "UnlearnResult", "method_config", "pick_device", "unlearn"]
