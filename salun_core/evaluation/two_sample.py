"""Can two sets of losses be told apart? The question that a held-out set answers without a retrained model."""

from __future__ import annotations

import numpy as np


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest distance of two empirical distribution functions.

    Args:
        first: losses, float64 [N], N at least 1.
        second: losses, float64 [M], M at least 1.

    Returns:
        D from 0 (the same values) to 1 (no overlap).

    Source:
        Smirnov, "Table for Estimating the Goodness of Fit of Empirical Distributions", Annals of Mathematical
        Statistics 1948.
    """
    places = np.concatenate([first, second])
    below = [np.searchsorted(np.sort(item), places, side="right") / len(item) for item in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def rank_area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the probability that a positive scores higher than a negative, a tie counted half: the area of the ROC.

    Args:
        positives: scores, float64 [N], N at least 1.
        negatives: scores, float64 [M], M at least 1.

    Returns:
        From 0 to 1; 1/2 when the score tells nothing.

    Source:
        Mann & Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the Other",
        Annals of Mathematical Statistics 1947.
    """
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left") + np.searchsorted(ordered, positives, side="right")
    return float(below.sum() / 2 / (len(positives) * len(negatives)))
