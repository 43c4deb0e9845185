"""What a pipeline's user interface shows of the evidence: plain numbers and lists, nothing of a sample."""

from __future__ import annotations

import math

from salun_core.evaluation import Evidence

MAX_CLASSES = 100  # a confusion matrix grows with the square, and lies in the interface's database


def scalar_metrics(evidence: Evidence) -> dict[str, float]:
    """Return the figures by which runs are compared.

    Args:
        evidence: of one evaluation.

    Returns:
        `UA_before`, `UA_after`, `UA_reference` and so on for each metric, `seconds_unlearn` and so on for each
        timed part, `mask_density`, `weights_changed_ratio` and `forget_ratio`; what was not measured is absent.
        Ratios from 0 to 1, but for FID and KID (distances), CLIP (0 to 100) and the seconds.
    """
    found: dict[str, float | None] = {
        f"{name}_{state}": getattr(metric, state)
        for name, metric in evidence.metrics.items()
        for state in ("before", "after", "reference")
    }
    found |= {f"seconds_{part}": seconds for part, seconds in evidence.run.seconds.items()}
    found["mask_density"] = evidence.run.density
    found["weights_changed_ratio"] = _ratio(evidence.integrity.weights_changed, evidence.integrity.weights)
    found["forget_ratio"] = _ratio(evidence.forgotten.count, evidence.forgotten.train_count)
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def confusion(evidence: Evidence) -> tuple[list[str], list[list[int]]] | None:
    """Return class names and the confusion matrix of the test split or the generated images, for the model after.

    Args:
        evidence: of one evaluation.

    Returns:
        (names, rows): rows are true classes, columns predicted ones. None beyond 100 classes, where none was
        measured, or where the matrix is not square, as of prompts that a judge sorts into its classes. Equal names
        are told apart by their class id.
    """
    names = evidence.classes
    if not evidence.confusion or len(names) > MAX_CLASSES:
        return None
    if {len(names)} != {len(evidence.confusion), *map(len, evidence.confusion)}:
        return None
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names)]
    return list(names), [list(row) for row in evidence.confusion]


def roc_points(evidence: Evidence) -> tuple[list[float], list[float], list[float]] | None:
    """Return the membership attack's ROC curve on the model after unlearning.

    Args:
        evidence: of one evaluation.

    Returns:
        (false positive rates, true positive rates, thresholds), or None where the attack could not be made, as on
        a generative model: log no curve then. The evidence keeps no losses, so the thresholds are the points'
        ranks, falling from 1 to 0: finite, as a user interface needs them.
    """
    curve = evidence.roc.get("after")
    if curve is None or not curve.fpr:
        return None
    last = max(len(curve.fpr) - 1, 1)
    return list(curve.fpr), list(curve.tpr), [1 - index / last for index in range(len(curve.fpr))]
