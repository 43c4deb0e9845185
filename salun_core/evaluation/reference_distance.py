"""Distances to a retrained model: KL divergence of the outputs, and the tug of war."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.outputs import Outputs

_TINY = 1e-30
_Z95 = 1.959963984540054
_SPLITS = ("forget", "retain", "test")

BySplit = Mapping[str, Outputs]


def kl_divergences(reference: Outputs, model: Outputs) -> np.ndarray:
    """Return KL(reference || model) of each sample: sum_k r_k (log r_k - log p_k).

    Args:
        reference: of the retrained model.
        model: of another one, on the same N images.

    Returns:
        float64 [N], in nats, >= 0 up to rounding; 0 where the two say the same.

    Source:
        Kullback & Leibler, "On Information and Sufficiency", Annals of Mathematical Statistics 1951.
    """
    r, p = reference.probabilities, model.probabilities
    terms = r * (np.log(np.clip(r, _TINY, 1)) - np.log(np.clip(p, _TINY, 1)))
    return np.asarray(terms.sum(axis=1))


def tug_of_war(reference: BySplit, model: BySplit) -> float:
    """Return ToW: the product over forget, retain and test of 1 - |accuracy - the retrained model's|.

    Args:
        reference: outputs of the retrained model by split.
        model: of another one.

    Returns:
        From 0 to 1; 1 where all three accuracies are the retrained model's.

    Source:
        Zhao et al., "What makes unlearning hard and what to do about it", NeurIPS 2024, section 3.
    """
    return math.prod(1 - abs(float(model[s].correct.mean() - reference[s].correct.mean())) for s in _SPLITS)


def kl_metrics(outputs: Mapping[str, BySplit]) -> dict[str, Metric]:
    """Return the mean divergence from the reference on D_f and on unseen data, in nats.

    Args:
        outputs: by model (before, after, reference) and split (forget, test).

    Returns:
        KL_forget and KL_test; without a reference their values are null.
    """
    return {f"KL_{split}": _kl_metric(outputs, split) for split in ("forget", "test")}


def _kl_metric(outputs: Mapping[str, BySplit], split: str) -> Metric:
    n = len(outputs["after"][split])
    if "reference" not in outputs:
        return Metric(before=None, after=None, n=n)
    reference = outputs["reference"][split]
    before, after = (kl_divergences(reference, outputs[model][split]) for model in ("before", "after"))
    if not np.isfinite(after).all():
        return Metric(before=None, after=None, n=n)
    half = _Z95 * float(after.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    mean = float(after.mean())
    low, high = (None, None) if half is None else (max(0.0, mean - half), mean + half)
    return Metric(before=float(before.mean()), after=mean, reference=0.0, n=n, low=low, high=high)


def tow_metric(outputs: Mapping[str, BySplit]) -> Metric:
    """Return ToW of the models before and after; without a reference both are null."""
    n = len(outputs["after"]["forget"])
    if "reference" not in outputs:
        return Metric(before=None, after=None, n=n)
    values = {model: tug_of_war(outputs["reference"], outputs[model]) for model in ("before", "after")}
    return Metric(before=values["before"], after=values["after"], reference=1.0, n=n)
