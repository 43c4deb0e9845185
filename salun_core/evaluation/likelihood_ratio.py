"""The likelihood-ratio attack (LiRA): a separate test for each sample, from shadow models.

Half of the shadow models were trained on a sample, half were not. Their confidences on it form two normal
distributions; the attack tests which of the two fits the attacked model's confidence better.
Source: Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from salun_core.data.images import ImageSource
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.outputs import TINY, Outputs, outputs_of
from salun_core.evaluation.statistics import area_metric, rank_area, share_metric
from salun_core.telemetry.progress import tracked

FEWEST_SHADOWS = 4
LOW_FPR = 0.01
_OWN_VARIANCE = (
    64  # shadow models from which each sample has its own variance; with fewer one is shared, as in the paper
)

Train = Callable[[ImageSource, int], nn.Module]
"""(training images, seed) -> a model trained on them, on the images' device."""


@dataclass(frozen=True)
class Shadows:
    """Confidences of S shadow models on N samples.

    Args:
        scaled: logit-scaled confidences, float64 [S, N].
        inside: whether the model was trained on the sample, bool [S, N]: at least two of each column, and at least two
            not. Half of them is best.
    """

    scaled: np.ndarray
    inside: np.ndarray


def logit_scaled(outputs: Outputs) -> np.ndarray:
    """Return log p_y - log(1 - p_y) of each sample, float64 [N]: nearly normal over independently trained models."""
    if outputs.logits is not None:  # the same from logits, which do not saturate
        rest = outputs.logits.copy()
        rest[np.arange(len(outputs)), outputs.labels] = -np.inf
        true = outputs.logits[np.arange(len(outputs)), outputs.labels]
        return np.asarray(true - np.logaddexp.reduce(rest, axis=1))
    others = outputs.probabilities.copy()
    others[np.arange(len(outputs)), outputs.labels] = 0.0  # their sum is 1 - p_y without cancellation near p_y = 1
    return np.asarray(np.log(outputs.confidences + TINY) - np.log(others.sum(axis=1) + TINY))


def assignments(shadows: int, samples: int, seed: int) -> np.ndarray:
    """Draw which shadow model is trained on which sample, bool [S, N], each sample by exactly half of them.

    S must be even and at least 4: a variance needs two models on each side.
    """
    if shadows < FEWEST_SHADOWS or shadows % 2:
        raise UsageError(
            f"the attack cannot use {shadows} shadow models",
            "half of them are trained on each sample, and a variance needs two models on each side",
            "give an even number of at least 4",
        )
    ranks = np.random.default_rng(seed).random((shadows, samples)).argsort(axis=0)
    return np.asarray(ranks < shadows // 2)


def train_shadows(train: Train, retain: ImageSource, pool: ImageSource, shadows: int, seed: int) -> Shadows:
    """Train the shadow models, each on D_r and its half of the pool, and measure their confidences on the pool.

    The pool is D_f and as many unseen images. Model i is trained with seed + i + 1, and is not kept.
    """
    inside = assignments(shadows, len(pool), seed)
    rows = []
    for index, chosen in enumerate(tracked(inside, "shadow models", shadows)):
        model = train(retain.joined(pool.select(np.flatnonzero(chosen).tolist())), seed + index + 1)
        rows.append(logit_scaled(outputs_of(model, pool)))
    return Shadows(np.stack(rows), inside)


def online_scores(attacked: np.ndarray, shadows: Shadows) -> np.ndarray:
    """Return log N(φ; μ_in, σ_in) - log N(φ; μ_out, σ_out) of each sample, float64 [N]: high for a member.

    `attacked` is φ, the attacked model's logit-scaled confidences, float64 [N].

    Source:
        Carlini et al., 2022, algorithm 1.
    """
    inside, outside = (_log_density(attacked, *_moments(shadows, side)) for side in (True, False))
    return np.asarray(inside - outside)


def offline_scores(attacked: np.ndarray, shadows: Shadows) -> np.ndarray:
    """Return (φ - μ_out) / σ_out of each sample: an attacker without models trained on it; high for a member.

    Source:
        Carlini et al., 2022, section V-B; the paper's 1 - Pr[Z > φ] grows with it.
    """
    mean, deviation = _moments(shadows, False)
    return np.asarray((attacked - mean) / deviation)


def _moments(shadows: Shadows, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    chosen = shadows.inside == inside
    count = chosen.sum(axis=0)  # half of the models, unless somebody else trained them
    mean = np.where(chosen, shadows.scaled, 0.0).sum(axis=0) / count
    variance = np.where(chosen, (shadows.scaled - mean) ** 2, 0.0).sum(axis=0) / (count - 1)
    if len(shadows.scaled) < _OWN_VARIANCE:
        variance = np.full_like(variance, variance.mean())
    return mean, np.sqrt(variance) + 1e-12  # models that agree to the last bit must not divide by 0


def _log_density(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return np.asarray(-0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation) - 0.5 * math.log(2 * math.pi))


def caught_at(members: np.ndarray, others: np.ndarray, fpr: float = LOW_FPR) -> float:
    """Return the share of members above a threshold that at most a share `fpr` of the others exceeds."""
    allowed = math.floor(fpr * len(others))
    return float((members > np.sort(others)[len(others) - 1 - allowed]).mean())


def lira_metrics(
    models: Mapping[str, nn.Module], shadows: Shadows, pool: ImageSource, members: int
) -> dict[str, Metric]:
    """Return lira_auc (online), lira_offline_auc and lira_tpr of each model.

    lira_tpr is the share of D_f that the online attack finds at a false positive rate of 1 % on the unseen images. The
    pool has D_f first (`members` images), then the unseen images.
    """
    phi = {name: logit_scaled(outputs_of(model, pool)) for name, model in models.items()}
    online = {name: online_scores(values, shadows) for name, values in phi.items()}
    offline = {name: offline_scores(values, shadows) for name, values in phi.items()}

    def area(scores: Mapping[str, np.ndarray]) -> Metric:
        areas = {name: rank_area(values[:members], values[members:]) for name, values in scores.items()}
        return area_metric(areas, members, len(pool) - members)

    found = {name: caught_at(scores[:members], scores[members:]) for name, scores in online.items()}
    return {"lira_auc": area(online), "lira_offline_auc": area(offline), "lira_tpr": share_metric(found, members)}
