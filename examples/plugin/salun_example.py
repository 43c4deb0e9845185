"""A plug-in with a method, a metric, an attack and an architecture; pyproject.toml names them as entry points."""

from collections.abc import Sequence

import numpy as np
from torch import Generator, Tensor, nn

from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.membership import modified_entropy
from salun_core.evaluation.optional_metrics import AddedAttack, AddedMetric, MeasuredModels
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.loop import Phase


def to_uniform(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the outputs with a uniform distribution."""
    logits: Tensor = model(images)
    return -logits.log_softmax(dim=1).mean()


def phases(context: ClassifierContext[UnlearnConfig], generator: Generator) -> Sequence[Phase]:
    """Return one epoch: forget images become uniform, retain images keep their labels."""
    return [context.phase("forget", context.forget, to_uniform), context.phase("retain", context.retain)]


def confidence(subject: MeasuredModels, seed: int) -> Metric:
    """Return the mean probability of the predicted class on forget images."""
    found = {name: outputs_of(model, subject.forget) for name, model in subject.models.items()}
    values = {name: float(outputs.probabilities.max(axis=1).mean()) for name, outputs in found.items()}
    return Metric.of(values, len(subject.forget))


def entropy_scores(retain: Outputs, unseen: Outputs, forget: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Return high scores for samples with low modified entropy."""
    return -modified_entropy(forget), -modified_entropy(unseen)


def pocket(num_classes: int) -> nn.Module:
    """Return a network of one layer for images of one channel."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, num_classes))


UNIFORM = ClassifierMethod(phases, needs_mask=True, defaults={"learning_rate": 0.02})
CONFIDENCE, ENTROPY_AREA = AddedMetric(confidence), AddedAttack(entropy_scores)
