"""The objective of a search: how well forget set and held-out data can be distinguished, and the accuracy lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from salun_core.data.images import ImageSet
from salun_core.evaluation.evidence import Metric
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import area_metric, kolmogorov_smirnov, rank_area, share_metric


@dataclass(frozen=True)
class ConstraintResult:
    """Whether figures stay within a policy.

    Args:
        reasons: rules that are broken; none: all hold.
        shortfall: by how much, summed, as a ratio.
    """

    reasons: list[str]
    shortfall: float = 0.0


Constraint = Callable[[Mapping[str, Metric]], ConstraintResult]
"""Figures by the names of the evidence, TA and attack_auc on held-out data -> which rules of a policy they break."""


@dataclass(frozen=True)
class Sets:
    """Images that a trial is measured on.

    Args:
        forget: D_f.
        retain: a fair draw of D_r.
        held_out: the validation split without classes that are forgotten as a whole; never the test split.
        classes: those classes, and any other of which nothing is left to retain.
    """

    forget: ImageSet
    retain: ImageSet
    held_out: ImageSet
    classes: tuple[int, ...] = ()

    @property
    def passes(self) -> int:
        """What measuring a model once costs: an image that only goes forward counts 1/3."""
        return math.ceil((len(self.forget) + len(self.retain) + len(self.held_out)) / 3)

    def read(self, model: nn.Module) -> Reading:
        """Run a model over all of them."""
        forget, retain, held_out = (outputs_of(model, item) for item in (self.forget, self.retain, self.held_out))
        return Reading(forget, retain, held_out, np.isin(forget.labels, self.classes))


@dataclass(frozen=True)
class Reading:
    """Outputs of one model on the sets.

    Args:
        forget: of D_f.
        retain: of the draw of D_r.
        held_out: of unseen data.
        whole: bool, which samples of D_f belong to a class that is forgotten as a whole.
    """

    forget: Outputs
    retain: Outputs
    held_out: Outputs
    whole: np.ndarray

    @property
    def single(self) -> Outputs:
        """D_f without whole classes; all of it if there is nothing else, as in the evaluation's attack."""
        return self.forget.where(~self.whole) if not self.whole.all() else self.forget

    @property
    def finite(self) -> bool:
        """Whether every output is a number."""
        return all(np.isfinite(item.losses).all() for item in (self.forget, self.retain, self.held_out))

    def shares(self) -> dict[str, np.ndarray]:
        """Return one bool a sample for each accuracy; its mean is the metric."""
        wrong = ~self.forget.correct
        found = {"UA": wrong, "RA": self.retain.correct, "TA": self.held_out.correct}
        groups = {"UA_class": self.whole, "UA_samples": ~self.whole}
        return found | {name: wrong[chosen] for name, chosen in groups.items() if chosen.any()}

    def attack_auc(self) -> float:
        """Return the AUC of the attack that takes a low loss as a sign of D_f."""
        return rank_area(-self.single.losses, -self.held_out.losses)


def metrics_of(before: Reading, after: Reading) -> dict[str, Metric]:
    """Return the figures that a policy's rules ask for, under the evidence's names.

    Args:
        before: of the original model.
        after: of a candidate.

    Returns:
        UA, UA_class, UA_samples, RA, TA (on held-out data) and attack_auc, with n and 95 % intervals.
    """
    old = before.shares()
    found = {
        name: share_metric({"before": float(old[name].mean()), "after": float(share.mean())}, len(share))
        for name, share in after.shares().items()
    }
    found["TA"] = found["TA"].model_copy(update={"origin": found["TA"].before})
    areas = {"before": before.attack_auc(), "after": after.attack_auc()}
    return found | {"attack_auc": area_metric(areas, len(after.single), len(after.held_out))}


def distance(before: Reading, after: Reading) -> float:
    """Return what the search makes small.

    Single samples: the mean of |2 AUC - 1|, the Kolmogorov-Smirnov distance of the losses of D_f and of held-out data,
    and |UA - (1 - accuracy on held-out data)|. Whole classes, a person's own among them: their accuracy, which is 0 in
    a model that never saw them. Both kinds: the mean of the two. What RA and the accuracy on held-out data lost is
    added; where whole classes alone are forgotten, what the latter gained is subtracted, for the classes that stay are
    told apart better without the others.

    Args:
        before: of the original model.
        after: of a candidate; all its outputs are numbers.

    Returns:
        0 where nothing tells forgotten from unseen and nothing was lost.
    """
    old, new = before.shares(), after.shares()
    lost = {name: float(old[name].mean() - new[name].mean()) for name in ("RA", "TA")}
    terms = []
    if "UA_samples" in new:
        apart = kolmogorov_smirnov(after.single.losses, after.held_out.losses)
        missed = abs(new["UA_samples"].mean() - (1 - new["TA"].mean()))
        terms.append((abs(2 * after.attack_auc() - 1) + apart + missed) / 3)
        lost["TA"] = max(0.0, lost["TA"])
    if "UA_class" in new:
        terms.append(1 - new["UA_class"].mean())
    return float(np.mean(terms)) + max(0.0, lost["RA"]) + lost["TA"]


def figures_of(metrics: Mapping[str, Metric], after: Reading) -> dict[str, float]:
    """Return the figures for the log, the two-sample statistic among them."""
    values = {name: metric.after for name, metric in metrics.items() if metric.after is not None}
    return {**values, "ks": kolmogorov_smirnov(after.single.losses, after.held_out.losses)}
