"""What an average hides: the forget samples that look most familiar, and the class that lost most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from salun_core.evaluation.comparison import wilson_interval
from salun_core.evaluation.evidence import ClassAccuracy, Metric
from salun_core.evaluation.outputs import Outputs

DECILE = 0.1


def familiar_share(forget: Outputs, test: Outputs) -> float:
    """Return the share of D_f whose loss is below that of nine tenths of the unseen data.

    Args:
        forget: D_f, at least one sample.
        test: unseen data, at least one sample.

    Returns:
        From 0 to 1; 0.1 where D_f looks like unseen data. It is the attack's true positive rate at a false positive
        rate of 10 %.
    """
    threshold = np.quantile(test.losses, DECILE)
    return float((forget.losses < threshold).mean())


def decile_metric(outputs: Mapping[str, Mapping[str, Outputs]]) -> Metric:
    """Return `worst_decile`: `familiar_share` by model, with Wilson's interval, the threshold taken as given.

    Args:
        outputs: by model (before, after, reference) and split (forget, test).
    """
    values = {model: familiar_share(by["forget"], by["test"]) for model, by in outputs.items()}
    n = len(outputs["after"]["forget"])
    low, high = wilson_interval(values["after"], n)
    return Metric(
        before=values["before"], after=values["after"], reference=values.get("reference"), n=n, low=low, high=high
    )


def worst_drop_metric(per_class: Sequence[ClassAccuracy], forgotten: Sequence[int]) -> Metric:
    """Return `worst_class_drop`: the largest loss of test accuracy of a class that is kept, as a ratio.

    Args:
        per_class: accuracies before and after.
        forgotten: classes that are forgotten as a whole; they are left out.

    Returns:
        0 before; n is the number of test images of the class that lost most; null where no class was measured.
    """
    drops = [
        (row.before - row.after, row.n)
        for row in per_class
        if row.before is not None and row.after is not None and row.class_id not in forgotten
    ]
    if not drops:
        return Metric(before=None, after=None, n=0)
    drop, n = max(drops)
    return Metric(before=0.0, after=drop, n=n)
