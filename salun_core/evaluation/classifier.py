"""Evaluation of a classifier before and after unlearning, optionally against a retrained reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSet
from salun_core.errors import DataError
from salun_core.evaluation.evidence import (
    ClassAccuracy,
    Curve,
    Distribution,
    Evidence,
    Forgotten,
    Measured,
    Metric,
    RunFacts,
    Series,
)
from salun_core.evaluation.integrity import compare_weights
from salun_core.evaluation.membership import (
    attack_roc,
    confidence_attack,
    entropy_attack,
    forgetting_metrics,
    match_classes,
)
from salun_core.evaluation.outputs import Outputs, outputs_of, penultimate_features
from salun_core.evaluation.statistics import average_gap, mean_metric, share_metric
from salun_core.saliency import SaliencyMask

BINS = 40  # as many as a panel of the report can show
LOSS_RANGE = (1e-5, 20.0)
"""In nats: probabilities of the true class from 0.99999 to 2e-9. Geometric bins keep both ends apart."""

_MATCHED = 2048  # images by which features are matched; a correlation is then known to about 0.02
_CONSTANT = 1e-12  # deviation of a feature below which it carries nothing to match

ByModel = Mapping[str, Mapping[str, Outputs]]
"""Model (before, after, reference) -> split (forget, retain, test) -> outputs."""


@dataclass(frozen=True)
class Splits:
    """The images that a classifier is evaluated on, all with true labels.

    Args:
        forget: D_f.
        retain: D_r.
        test: unseen data; TA leaves out the classes of which nothing is retained.
    """

    forget: ImageSet
    retain: ImageSet
    test: ImageSet


def evaluate_classifier(
    before: nn.Module,
    after: nn.Module,
    splits: Splits,
    measured: Measured,
    forgotten: Forgotten,
    reference: nn.Module | None = None,
    mask: SaliencyMask | None = None,
    classes: list[str] | None = None,
    run: RunFacts | None = None,
) -> Evidence:
    """Measure UA, RA, TA, MIA, what unlearning changed, and the figures of the report.

    UA = 1 - accuracy on D_f; RA = accuracy on D_r; TA = accuracy on the test split; MIA = share of D_f that the
    confidence attack classifies as non-member; all as ratios with n and a 95 % interval. D_f is compared with unseen
    samples of its own classes, in its own mixture (`membership.match_classes`).

    Args:
        before: the original model.
        after: the unlearned model.
        splits: images on the models' device.
        measured: digests of everything that is measured here.
        forgotten: what had to be forgotten.
        reference: a model retrained without D_f.
        mask: weights outside it are compared bit by bit.
        classes: class names by id.
        run: how `after` was produced.

    Returns:
        The evidence.

    Raises:
        DataError: a split is empty.
        ModelError: the models or the mask do not fit each other.
    """
    for name, images in (("forget", splits.forget), ("retain", splits.retain), ("test", splits.test)):
        if len(images) == 0:
            raise DataError(
                f"the {name} split is empty", "no metric can be measured on it", "check the data and the forget target"
            )
    models = {"before": before, "after": after} | ({"reference": reference} if reference is not None else {})
    whole_test = {name: outputs_of(model, splits.test) for name, model in models.items()}
    kept = ~np.isin(whole_test["after"].labels, forgotten.classes)
    if not kept.any():
        raise DataError("no test image is left", "all their classes are forgotten", "keep at least one class")
    outputs = {
        name: {
            "forget": outputs_of(model, splits.forget),
            "retain": outputs_of(model, splits.retain),
            "test": whole_test[name].where(kept),
        }
        for name, model in models.items()
    }
    names = classes or [str(index) for index in range(whole_test["after"].probabilities.shape[1])]
    metrics, roc = _share_metrics(outputs, forgotten.classes), dict[str, Curve]()
    # Samples of a class of which nothing is retained become unlike all data; the attack is on the others, if there are
    # any. Unseen samples of the class itself are in the whole test split, so that either can be compared.
    labels = outputs["after"]["forget"].labels
    single = ~np.isin(labels, forgotten.classes)
    asked = single | ~single.any()
    subject = {name: by_split["forget"].where(asked) for name, by_split in outputs.items()}
    for name, found in subject.items():
        curve = attack_roc(found, whole_test[name])
        roc |= {name: curve} if curve is not None else {}
    metrics |= forgetting_metrics(subject, whole_test)
    for name, split in (("TA_loss", "test"), ("RA_loss", "retain")):
        metrics[name] = mean_metric({model: by_split[split].losses for model, by_split in outputs.items()})
    if not single.all():
        emptied = splits.forget.select(np.flatnonzero(~single).tolist())
        metrics["restored"] = restored_metric(models, emptied, splits.retain)
    # The caller replaces the origin with the value of the model line's last full training, if it knows the line.
    metrics["TA"] = metrics["TA"].model_copy(update={"origin": metrics["TA"].before})
    if reference is not None:
        metrics["gap"] = Metric(before=average_gap(metrics, "before"), after=average_gap(metrics), n=len(splits.forget))
    return Evidence(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=measured,
        forgotten=forgotten,
        integrity=compare_weights(before, after, mask),
        metrics=metrics,
        distributions=distributions(outputs),
        per_class=accuracy_by_class(whole_test["before"], whole_test["after"], names),
        roc=roc,
        confusion=confusion(whole_test["after"], len(names)),
        classes=names,
        run=run or RunFacts(),
    )


def restored_metric(models: Mapping[str, nn.Module], forget: ImageSet, retain: ImageSet) -> Metric:
    """Return `restored`: the share of forgotten images that is recognised with the last layer of the model before.

    An edit of the outputs leaves the features as they were: a bias of -100 hides a class, and the former last layer
    brings it back. Order and scale of the features can be changed without changing any output, so the layer is tried on
    the features as they are and on features matched to those before; the larger share counts.

    Args:
        models: by name: before, after, perhaps reference.
        forget: images of classes of which nothing is retained, at least one.
        retain: images by which features are matched, at least one. They hold nothing of the forgotten classes, so that
            the match of a model that never saw these classes does not depend on them.

    Returns:
        The metric; null if the models have no linear layer or their features are not finite. Before, it is the accuracy
        on these images.
    """
    layers = [module for module in models["before"].modules() if isinstance(module, nn.Linear)]
    labels, shares = forget.labels.cpu(), dict[str, float]()
    kept = retain.select(np.unique(np.linspace(0, len(retain) - 1, _MATCHED).astype(int)).tolist())
    matched_to: Tensor | None = None
    for name, model in models.items() if layers else ():
        asked, seen = _features(model, forget), _features(model, kept)
        if asked is None or seen is None or not (torch.isfinite(asked).all() and torch.isfinite(seen).all()):
            return Metric.of({}, len(forget))
        matched_to = seen if matched_to is None else matched_to
        with torch.no_grad():
            layer = copy.deepcopy(layers[-1]).cpu()
            found = [layer(features).argmax(dim=1) == labels for features in (asked, _matched(asked, seen, matched_to))]
        shares[name] = max(float(right.double().mean()) for right in found)
    return share_metric(shares, len(forget))


def _features(model: nn.Module, images: ImageSet) -> Tensor | None:
    return penultimate_features(model, lambda size: (inputs for inputs, _ in images.batches(size)))


def _matched(asked: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """Return features in the order and with the scale of another model's.

    Args:
        asked: features to return, [N, D].
        seen: features of the same model on other images, [M, D].
        wanted: features of the other model on those, [M, D]. Each feature takes the place of the one that it is
            correlated with, such that the sum of the correlations is largest.
    """
    from scipy.optimize import linear_sum_assignment

    deviations = [side.double().std(dim=0, correction=0) for side in (seen, wanted)]
    scores = [
        (side.double() - side.double().mean(dim=0)) / deviation.clamp(min=_CONSTANT)
        for side, deviation in zip((seen, wanted), deviations, strict=True)
    ]
    own, place = map(torch.from_numpy, linear_sum_assignment((scores[0].T @ scores[1]).numpy(), maximize=True))
    varies = (deviations[0][own] > _CONSTANT) & (deviations[1][place] > _CONSTANT)
    scale = torch.where(varies, deviations[1][place] / deviations[0][own].clamp(min=_CONSTANT), 1.0)
    result = torch.empty_like(asked)
    result[:, place] = (asked[:, own].double() * scale).to(asked.dtype)
    return result


def metric_shares(by_split: Mapping[str, Outputs]) -> dict[str, np.ndarray]:
    """Return each metric as one bool per sample; its mean is the metric.

    Args:
        by_split: outputs of one model on forget, retain and test.

    Returns:
        UA, RA, TA, and if all outputs are finite MIA and MIA_entropy.
    """
    forget, retain, test = by_split["forget"], by_split["retain"], by_split["test"]
    shares = {"UA": ~forget.correct, "RA": retain.correct, "TA": test.correct}
    if all(np.isfinite(item.probabilities).all() for item in (forget, retain, test)):
        shares["MIA"] = confidence_attack(retain, test, forget)
        shares["MIA_entropy"] = entropy_attack(retain, test, forget)
    return shares


def _share_metrics(outputs: ByModel, classes: list[int]) -> dict[str, Metric]:
    """UA, RA, TA and MIA; UA_class of classes that are forgotten as a whole and UA_samples of the other samples."""
    shares = {model: metric_shares(by_split) for model, by_split in outputs.items()}
    sizes = {split: len(item) for split, item in outputs["after"].items()}
    split_of = {"UA": "forget", "RA": "retain", "TA": "test", "MIA": "forget", "MIA_entropy": "forget"}
    metrics = {
        name: share_metric(
            {model: float(found[name].mean()) for model, found in shares.items() if name in found}, sizes[split]
        )
        for name, split in split_of.items()
    }
    whole = np.isin(outputs["after"]["forget"].labels, classes)
    for name, chosen in (("UA_class", whole), ("UA_samples", ~whole)):
        if chosen.any():
            values = {model: float(found["UA"][chosen].mean()) for model, found in shares.items()}
            metrics[name] = share_metric(values, int(chosen.sum()))
    return metrics


def distributions(outputs: ByModel) -> dict[str, Distribution]:
    """Return histograms of the loss (nats) and of the confidence; the end bins count all values beyond them.

    Those of unseen data are weighted to the class histogram of D_f.
    """
    return {
        "loss": _histograms(outputs, lambda item: item.losses, np.geomspace(*LOSS_RANGE, BINS + 1)),
        "confidence": _histograms(outputs, lambda item: item.confidences, np.linspace(0, 1, BINS + 1)),
    }


def _histograms(outputs: ByModel, values_of: Callable[[Outputs], np.ndarray], edges: np.ndarray) -> Distribution:
    weights = match_classes(outputs["before"]["forget"].labels, outputs["before"]["test"].labels).weights

    def counts(item: Outputs, split: str) -> list[int]:
        values = values_of(item)
        finite = np.isfinite(values)
        clipped = np.clip(values[finite], edges[0], edges[-1])
        shares = np.histogram(clipped, bins=edges, weights=weights[finite] if split == "test" else None)[0]
        # Rounding the sums, not the bins, keeps the total: weights have mean 1.
        found: list[int] = np.diff(np.round(np.cumsum(shares)), prepend=0).astype(int).tolist()
        return found

    splits = {
        split: Series.model_validate({model: counts(by_split[split], split) for model, by_split in outputs.items()})
        for split in outputs["before"]
    }
    return Distribution(edges=edges.tolist(), splits=splits)


def accuracy_by_class(before: Outputs, after: Outputs, classes: list[str]) -> list[ClassAccuracy]:
    """Return the accuracy of each class on the test split, before and after, as ratios."""
    rows = []
    for class_id, name in enumerate(classes):
        chosen = before.labels == class_id
        n = int(chosen.sum())
        values = [float(item.correct[chosen].mean()) if n else None for item in (before, after)]
        rows.append(ClassAccuracy(class_id=class_id, name=name, before=values[0], after=values[1], n=n))
    return rows


def confusion(outputs: Outputs, num_classes: int) -> list[list[int]]:
    """Return the confusion matrix, rows true and columns predicted, as counts."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (outputs.labels, outputs.predictions), 1)
    rows: list[list[int]] = matrix.tolist()
    return rows
