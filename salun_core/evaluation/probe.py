"""A linear probe: do the features in front of the last layer still tell the forget set from unseen data?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSet
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.statistics import auc_interval, rank_area

_FOLDS = 5


@torch.no_grad()
def features_of(model: nn.Module, images: ImageSet, batch_size: int = 512) -> np.ndarray | None:
    """Return what the last linear layer gets for each image.

    Args:
        model: on the device of the images.
        images: N of them.
        batch_size: images a forward pass.

    Returns:
        float64 [N, D]; None for a model without a linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        return None
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).cpu().double()))
    training = model.training
    try:
        model.eval()
        for inputs, _ in images.batches(batch_size):
            model(inputs)
    finally:
        hook.remove()
        model.train(training)
    return np.asarray(torch.cat(seen).numpy())


def probe_scores(positives: np.ndarray, negatives: np.ndarray, seed: int) -> np.ndarray:
    """Score each row by a logistic regression that was fitted without it.

    Args:
        positives: features of D_f, float64 [N, D].
        negatives: features of unseen data, float64 [M, D].
        seed: of the folds.

    Returns:
        float64 [N + M], high for what looks like D_f.

    Source:
        Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2016.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.concatenate([positives, negatives])
    truth = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced"))
    return np.asarray(cross_val_predict(fit, rows, truth, cv=folds, method="decision_function"))


def probe_metric(models: Mapping[str, nn.Module], forget: ImageSet, unseen: ImageSet, seed: int) -> Metric:
    """Return `probe_auc`: the area of telling D_f from unseen data by a linear probe, five-fold.

    Args:
        models: by name: before, after, perhaps reference.
        forget: D_f.
        unseen: test images of kept classes.
        seed: of the folds.

    Returns:
        The metric; null where there are fewer than five of either, or no linear layer.
    """
    if min(len(forget), len(unseen)) < _FOLDS:
        return Metric(before=None, after=None, n=len(forget))
    areas: dict[str, float] = {}
    for name, model in models.items():
        positives, negatives = features_of(model, forget), features_of(model, unseen)
        if positives is None or negatives is None or not np.isfinite(positives).all():
            return Metric(before=None, after=None, n=len(forget))
        scores = probe_scores(positives, negatives, seed)
        areas[name] = rank_area(scores[: len(forget)], scores[len(forget) :])
    low, high = auc_interval(areas["after"], len(forget), len(unseen))
    return Metric(
        before=areas["before"],
        after=areas["after"],
        reference=areas.get("reference"),
        n=len(forget),
        low=low,
        high=high,
    )
