"""The evaluation's measurements that are off by default: where their shadow models and repeated runs come from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import RunFacts
from salun_core.evaluation.optional_metrics import Subject, measure_optional_metrics
from salun_core.methods.classification import METHODS, UnlearnConfig, method_config, unlearn
from salun_core.methods.classification.training import fresh_classifier, train_classifier
from salun_core.saliency import SaliencyMask
from salun_core.tasks.classification.inputs import Inputs


def further_evidence(
    evidence: Evidence,
    asked: Mapping[str, int],
    inputs: Inputs,
    models: Mapping[str, nn.Module],
    test: ImageSet,
    mask: SaliencyMask | None,
    device: torch.device,
) -> Evidence:
    """Make the measurements that were asked for.

    Args:
        evidence: of the same models.
        asked: from `parse_optional_metrics`.
        inputs: the original model, its data and the forget set.
        models: by name: before, after, perhaps reference; on the device.
        test: the test split.
        mask: that the run used.
        device: where the models are.

    Returns:
        The evidence with more metrics.

    Raises:
        UsageError: the run cannot be repeated, for its facts are not known or it takes other seeds nowhere.
    """
    if "seeds" in asked and evidence.run.method not in METHODS:
        raise UsageError("the unlearning cannot be repeated", "its run.json is not known", "leave `seeds` out")
    gone = set(evidence.forgotten.classes)
    kept = [index for index, label in enumerate(test.labels.tolist()) if label not in gone]
    subject = Subject(models, inputs.forget.to(device), inputs.retain.to(device), test.select(kept).to(device))
    train = partial(_shadow, inputs, str(device))
    rerun = partial(_again, inputs, evidence.run, mask, device)
    return measure_optional_metrics(evidence, asked, subject, train, rerun, evidence.run.seed or 0)


def _shadow(inputs: Inputs, device: str, images: ImageSet, seed: int) -> nn.Module:
    """Train a shadow model by the recipe on the model card: the attacker knows it."""
    card = inputs.original.card
    changes = {"device": device, "batch_norm": "update", "seed": seed}
    config = method_config("retrain", {**card.training, **changes})
    return train_classifier(card.architecture, images, len(card.classes), config)[0]


def _again(inputs: Inputs, run: RunFacts, mask: SaliencyMask | None, device: torch.device, seed: int) -> nn.Module:
    config = UnlearnConfig.model_validate({**run.config, "seed": seed, "device": str(device)})
    card = inputs.original.card
    result = unlearn(
        inputs.original.model,
        run.method,
        forget=inputs.forget,
        retain=inputs.retain,
        config=config,
        mask=mask if METHODS[run.method].needs_mask else None,
        fresh=lambda: fresh_classifier(card.architecture, inputs.retain, len(card.classes), seed),
    )
    return result.model
