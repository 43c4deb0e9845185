"""Several seeds: how much would the figures change if the same unlearning ran again?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.outputs import Outputs
from salun_core.evaluation.two_sample import rank_area

NAMES = ("UA", "RA", "TA", "attack_auc")


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean over independent runs, by Student's t.

    Args:
        values: at least two.

    Returns:
        (low, high).

    Source:
        Student, "The Probable Error of a Mean", Biometrika 1908.
    """
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - half, mean + half


def run_figures(outputs: Mapping[str, Outputs]) -> dict[str, float]:
    """Return UA, RA, TA and attack_auc of one model.

    Args:
        outputs: by split: forget, retain, test.
    """
    forget, retain, test = outputs["forget"], outputs["retain"], outputs["test"]
    return {
        "UA": float(1 - forget.correct.mean()),
        "RA": float(retain.correct.mean()),
        "TA": float(test.correct.mean()),
        "attack_auc": rank_area(-forget.losses, -test.losses),
    }


def seed_metrics(before: Mapping[str, float], runs: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    """Return UA_seeds and so on: means over the runs with their intervals; n is the number of runs.

    Args:
        before: figures of the original model.
        runs: figures of each run, that of the evaluated model among them; at least two.
    """
    found = {}
    for name in NAMES:
        values = [run[name] for run in runs]
        low, high = mean_interval(values)
        mean = float(np.mean(values))
        found[f"{name}_seeds"] = Metric(before=before[name], after=mean, n=len(values), low=low, high=high)
    return found
