"""The objective of a search: how well forget set and held-out data can be distinguished, and the accuracy lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from salun_core.data.images import ImageSource
from salun_core.evaluation.classifier import attacked, compare
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.membership import match_classes, matched_area
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import kolmogorov_smirnov
from salun_core.gate import Cause


@dataclass(frozen=True)
class ConstraintResult:
    """Result of checking metrics against a policy.

    Args:
        reasons: broken rules; empty if all rules hold.
        shortfall: sum of the distances to the broken thresholds, as ratios.
        causes: why each of these rules failed, in the same order.
    """

    reasons: list[str]
    shortfall: float = 0.0
    causes: list[Cause] = field(default_factory=list)


Constraint = Callable[[Mapping[str, Metric]], ConstraintResult]
"""(metrics by evidence name, with TA and attack_auc on held-out data) -> the broken rules of a policy."""


@dataclass(frozen=True)
class Sets:
    """Images for the measurement of a trial.

    Args:
        forget: D_f.
        retain: a random sample of D_r.
        held_out: the validation split without the classes that are forgotten completely; never the test split.
        classes: those classes, and any other class without images left to retain.
    """

    forget: ImageSource
    retain: ImageSource
    held_out: ImageSource
    classes: tuple[int, ...] = ()

    @property
    def passes(self) -> int:
        """Cost of one measurement in image passes; a forward pass alone counts 1/3."""
        return math.ceil((len(self.forget) + len(self.retain) + len(self.held_out)) / 3)

    def read(self, model: nn.Module) -> Reading:
        """Run a model over all sets."""
        forget, retain, held_out = (outputs_of(model, item) for item in (self.forget, self.retain, self.held_out))
        return Reading(forget, retain, held_out, np.isin(forget.labels, self.classes))


@dataclass(frozen=True)
class Reading:
    """Outputs of one model on the sets.

    Args:
        forget: outputs on D_f.
        retain: outputs on the sample of D_r.
        held_out: outputs on unseen data.
        whole: bool, marks the samples of D_f whose class is forgotten completely.
    """

    forget: Outputs
    retain: Outputs
    held_out: Outputs
    whole: np.ndarray

    @property
    def single(self) -> Outputs:
        """D_f without whole classes; all of it if there is nothing else, as in the evaluation's attack."""
        return self.forget.where(attacked(self.whole))

    @property
    def finite(self) -> bool:
        """Whether all outputs are finite."""
        items = (self.forget, self.retain, self.held_out)
        return all(np.isfinite(item.losses).all() and np.isfinite(item.margins).all() for item in items)

    @property
    def weights(self) -> np.ndarray:
        """Weights of the held-out samples, which give them the class histogram of `single`."""
        return match_classes(self.single.labels, self.held_out.labels).weights

    @property
    def missed(self) -> float:
        """Share of held-out data of the same classes that is misclassified."""
        return float(np.average(~self.held_out.correct, weights=self.weights))

    def shares(self) -> dict[str, np.ndarray]:
        """Return one bool per sample for each accuracy; its mean is the metric."""
        wrong = ~self.forget.correct
        found = {"UA": wrong, "RA": self.retain.correct, "TA": self.held_out.correct}
        groups = {"UA_class": self.whole, "UA_samples": ~self.whole}
        return found | {name: wrong[chosen] for name, chosen in groups.items() if chosen.any()}

    def attack_auc(self) -> float:
        """Return the AUC of the attack that takes a high margin as a sign of D_f."""
        return matched_area(self.single, self.held_out)

    def apart(self) -> float:
        """Return the Kolmogorov-Smirnov distance of the margins of D_f and of held-out data of the same classes."""
        chosen, weights = match_classes(self.single.labels, self.held_out.labels)
        return kolmogorov_smirnov(self.single.margins[chosen], self.held_out.margins, weights)


def metrics_of(before: Reading, after: Reading) -> dict[str, Metric]:
    """Return the metrics that policy rules use, by their names in the evidence.

    They are those of `evaluation.classifier.compare`; TA and the attack are on held-out data.
    """
    outputs = {
        name: {"forget": seen.forget, "retain": seen.retain, "test": seen.held_out}
        for name, seen in (("before", before), ("after", after))
    }
    return compare(outputs, after.whole)


def distance(before: Reading, after: Reading) -> float:
    """Return the value that the search minimises: the reported gap, with estimates in place of a retrained model.

    The mean of four terms with equal weights, as in `average_gap`: UA, attack, RA and TA. D_f is compared with held-out
    data that are weighted to its class histogram. It is 0 if forgotten and unseen data cannot be told apart and no
    accuracy was lost. All outputs must be finite.

    UA: the distance to the share of held-out data that the original misclassifies. The candidate's own share would
    excuse a candidate that is wrong everywhere. For complete classes, including those of one person, the accuracy on
    them, which is 0 for a model that never saw them.

    Attack: the mean of |2 AUC - 1| and the Kolmogorov-Smirnov distance of the margins of D_f and of held-out data, both
    of the candidate. For complete classes the AUC itself, which is near 0 for a model that never saw them.

    RA, TA: the decrease. If only complete classes are forgotten, an increase of TA is subtracted, because the other
    classes are easier to tell apart without them.

    A forget set with both kinds has the mean of both in the first two terms.
    """
    old, new = before.shares(), after.shares()
    lost = {name: float(old[name].mean() - new[name].mean()) for name in ("RA", "TA")}
    accuracies: list[float] = []
    attacks: list[float] = []
    if "UA_samples" in new:
        accuracies.append(abs(new["UA_samples"].mean() - before.missed))
        attacks.append((abs(2 * after.attack_auc() - 1) + after.apart()) / 2)
        lost["TA"] = max(0.0, lost["TA"])
    if "UA_class" in new:
        accuracies.append(1 - new["UA_class"].mean())
        attacks.append(matched_area(after.forget.where(after.whole), after.held_out))
    return float(np.mean(accuracies) + np.mean(attacks) + max(0.0, lost["RA"]) + lost["TA"]) / 4


def figures_of(metrics: Mapping[str, Metric], after: Reading) -> dict[str, float]:
    """Return the metrics for the log, including the two-sample statistic."""
    values = {name: metric.after for name, metric in metrics.items() if metric.after is not None}
    return {**values, "ks": after.apart()}
