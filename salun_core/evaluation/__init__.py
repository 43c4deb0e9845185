"""Evaluation of unlearning: accuracies, membership attack, intervals, evidence."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salun_core.evaluation.classifier import Splits as Splits
    from salun_core.evaluation.classifier import evaluate_classifier as evaluate_classifier
    from salun_core.evaluation.evidence import Evidence as Evidence
    from salun_core.evaluation.evidence import Metric as Metric

_MODULES = {"Evidence": "evidence", "Metric": "evidence", "Splits": "classifier", "evaluate_classifier": "classifier"}

__all__ = ["Evidence", "Metric", "Splits", "evaluate_classifier"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a name on first use: gate and report need evidence without the import time of torch."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"salun_core.evaluation.{_MODULES[name]}"), name)
