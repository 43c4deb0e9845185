"""Evaluation of unlearning: accuracies, membership attack, intervals, evidence."""

from salun_core.evaluation.classifier import Splits, evaluate_classifier
from salun_core.evaluation.evidence import Evidence, Metric

__all__ = ["Evidence", "Metric", "Splits", "evaluate_classifier"]
