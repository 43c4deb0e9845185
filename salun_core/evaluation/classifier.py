"""Evaluation of a classifier before and after unlearning, optionally against a retrained reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.digest import sha256_bytes
from salun_core.errors import DataError, UsageError
from salun_core.evaluation.evidence import (
    EVALUATE_MORE,
    ClassAccuracy,
    Curve,
    Distribution,
    Evidence,
    Forgotten,
    Measured,
    Metric,
    RunFacts,
    SampleCount,
    Sampling,
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
from salun_core.evaluation.metrics import CLASSIFIER, functions_of
from salun_core.evaluation.outputs import Outputs, Processes, outputs_of, penultimate_features
from salun_core.evaluation.statistics import average_gap, effective_size, mean_metric, share_metric, stratified
from salun_core.saliency import SaliencyMask

BINS = 40  # as many as a panel of the report can show
LOSS_RANGE = (1e-5, 20.0)
"""In nats: probabilities of the true class from 0.99999 to 2e-9. Geometric bins keep both ends apart."""

_MATCHED = 2048  # images by which features are matched; a correlation is then known to about 0.02
_SAME = 0.8
"""Least correlation of a feature that was only renamed or fine-tuned. Those of retrained nets stay below: a layer that
was aligned with whatever resembles its own features restores a class that the net never saw, up to 0.9 in convolutional
nets (docs/research/calibration.md)."""
_CONSTANT = 1e-12  # deviation of a feature below which it carries nothing to match

ByModel = Mapping[str, Mapping[str, Outputs]]
"""Model (before, after, reference) -> split (forget, retain, test) -> outputs."""


@dataclass(frozen=True)
class Splits:
    """The images that a classifier is evaluated on, all with true labels.

    Args:
        test: unseen data; TA leaves out the classes of which nothing is retained.
        held_out: the validation split, for `unlearn`; the evaluation does not read it.
        sampling: which of D_r and the test split are samples; None if both are whole.
        weights: of the images of those samples, by split; see `stratified`.
    """

    forget: ImageSource
    retain: ImageSource
    test: ImageSource
    held_out: ImageSource | None = None
    sampling: Sampling | None = None
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    def sampled(self, most: int | None, measured: Measured) -> Splits:
        """Return the splits to measure: of D_r and the test split at most `most` images (None: all), and D_f whole.

        The seed follows from the digests of what is measured. So nobody can choose it, an unlearning that changes the
        model to suit the sample gets another sample, and anyone who has the files can draw it again.
        """
        names = [name for name in ("retain", "test") if most is not None and len(getattr(self, name)) > most]
        if most is None or not names:
            return self
        digests = (measured.before, measured.after, measured.split, measured.forget_set)
        seed = int(sha256_bytes(f"evaluation {' '.join(digests)}".encode())[:13], 16)  # below 2**53
        changes: dict[str, ImageSource] = {}
        counts, weights = dict[str, SampleCount](), dict[str, np.ndarray]()
        for number, name in enumerate(names):
            images: ImageSource = getattr(self, name)
            labels = images.labels.cpu().numpy()
            if (classes := len(np.unique(labels))) > most:
                raise UsageError(
                    f"{most} images cannot stand for the {name} split", f"it has {classes} classes", EVALUATE_MORE
                )
            places, weights[name] = stratified(labels, most, seed + number)
            changes[name] = images.select(torch.from_numpy(places))
            counts[name] = SampleCount(n=most, of=len(images))
        return replace(self, **changes, sampling=Sampling(seed=seed, splits=counts), weights=weights)


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
    outputs: ByModel | None = None,
) -> Evidence:
    """Measure UA, RA, TA, MIA, what unlearning changed, and the figures of the report.

    UA = 1 - accuracy on D_f; RA = accuracy on D_r; TA = accuracy on the test split; MIA = share of D_f that the
    confidence attack classifies as non-member; all as ratios with n and a 95 % interval. D_f is compared with unseen
    samples of its own classes, in its own mixture (`membership.match_classes`). `outputs` come from `split_outputs`.
    """
    for name, images in (("forget", splits.forget), ("retain", splits.retain), ("test", splits.test)):
        if len(images) == 0:
            raise DataError(
                f"the {name} split is empty", "no metric can be measured on it", "check the data and the forget target"
            )
    models = {"before": before, "after": after} | ({"reference": reference} if reference is not None else {})
    outputs = outputs or {name: split_outputs(model, splits) for name, model in models.items()}
    seen = Comparison(models, outputs, splits, forgotten)
    names = classes or [str(index) for index in range(outputs["after"]["test"].probabilities.shape[1])]
    metrics = measured_metrics(seen)
    roc = dict[str, Curve]()
    for name, by_split in outputs.items():
        curve = attack_roc(by_split["forget"].where(attacked(seen.whole)), by_split["test"])
        roc |= {name: curve} if curve is not None else {}
    metrics = with_populations(metrics, splits.sampling)
    return Evidence(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        measured=measured,
        forgotten=forgotten,
        integrity=compare_weights(before, after, mask),
        metrics=metrics,
        distributions=distributions(seen.kept),
        per_class=accuracy_by_class(outputs["before"]["test"], outputs["after"]["test"], names),
        roc=roc,
        confusion=confusion(outputs["after"]["test"], len(names)),
        classes=names,
        run=run or RunFacts(),
        sampling=splits.sampling,
    )


def with_populations(metrics: Mapping[str, Metric], sampling: Sampling | None) -> dict[str, Metric]:
    """Return metrics with the number of images that their samples were drawn from; plug-ins may read any split."""
    found = dict(metrics)
    for split, count in (sampling.splits if sampling else {}).items():
        for name, metric in found.items():
            row = CLASSIFIER.get(name)
            if metric.population is None and (row is None or split in row.on):
                # The n of a metric of both splits is that of the sample, not of D_f.
                n = count.n if row is not None and len(row.on) > 1 else metric.n
                found[name] = metric.model_copy(update={"population": count.of, "n": n})
    return found


def split_outputs(model: nn.Module, splits: Splits, processes: Processes | None = None) -> dict[str, Outputs]:
    """Return the outputs of a model on forget, retain and the whole test split; `processes` as for `outputs_of`."""
    names = ("forget", "retain", "test")
    found = {name: outputs_of(model, getattr(splits, name), processes=processes) for name in names}
    return {name: replace(item, weights=splits.weights.get(name)) for name, item in found.items()}


@dataclass
class Comparison:
    """What the metrics of a classifier are computed from.

    Args:
        models: by name: before, after, perhaps reference.
        outputs: of each, from `split_outputs`.
        found: metrics of earlier stages.
    """

    models: Mapping[str, nn.Module]
    outputs: ByModel
    splits: Splits
    forgotten: Forgotten
    found: dict[str, Metric] = field(default_factory=dict)

    @cached_property
    def whole(self) -> np.ndarray:
        """Which samples of D_f are of classes of which nothing is retained, bool [N]."""
        return np.isin(self.outputs["after"]["forget"].labels, self.forgotten.classes)

    @cached_property
    def kept(self) -> dict[str, dict[str, Outputs]]:
        """The outputs with a test split that lacks the classes of which nothing is retained.

        If no test image is left, it raises a `DataError`.
        """
        kept = ~np.isin(self.outputs["after"]["test"].labels, self.forgotten.classes)
        if not kept.any():
            raise DataError("no test image is left", "all their classes are forgotten", "keep at least one class")
        return {name: {**by_split, "test": by_split["test"].where(kept)} for name, by_split in self.outputs.items()}


def measured_metrics(seen: Comparison, most: int | None = None) -> dict[str, Metric]:
    """Return the metrics of the table that are on by default, up to the stage `most`."""
    rows = [row for row in CLASSIFIER.values() if not row.extra and (most is None or row.stage <= most)]
    for measure in functions_of(rows):
        seen.found |= measure(seen)
    return seen.found


def attacked(whole: np.ndarray) -> np.ndarray:
    """Return which samples of D_f the attack is on, bool [N]; `whole` marks those of completely forgotten classes.

    Samples of such a class become unlike all data. The attack is on the others, if there are any.
    """
    return np.asarray(~whole | whole.all())


def compare(outputs: ByModel, whole: np.ndarray, unseen: Mapping[str, Outputs] | None = None) -> dict[str, Metric]:
    """Return UA, RA, TA, UA_class, UA_samples, TA_loss, RA_loss and the metrics of `forgetting_metrics`.

    `test` holds unseen data of the retained classes. `unseen` may also be of the classes that are forgotten completely
    (`whole`, bool [N]), and D_f is compared with it; by default it is `test`.
    """
    metrics = _share_metrics(outputs, whole)
    # The caller replaces the origin with the value of the model line's last full training, if it knows the line.
    metrics["TA"] = metrics["TA"].model_copy(update={"origin": metrics["TA"].before})
    metrics |= forgetting_metrics(
        {name: by_split["forget"].where(attacked(whole)) for name, by_split in outputs.items()},
        unseen or {name: by_split["test"] for name, by_split in outputs.items()},
    )
    for name, split in (("TA_loss", "test"), ("RA_loss", "retain")):
        losses = {model: by_split[split].losses for model, by_split in outputs.items()}
        metrics[name] = mean_metric(losses, outputs["after"][split].weights)
    return metrics


def compared(seen: Comparison) -> dict[str, Metric]:
    """Compare the models; see `compare`."""
    return compare(seen.kept, seen.whole, {name: by_split["test"] for name, by_split in seen.outputs.items()})


def restored(seen: Comparison) -> dict[str, Metric]:
    """Return `restored` if whole classes are forgotten."""
    if not seen.whole.any():
        return {}
    forget = seen.splits.forget.select(np.flatnonzero(seen.whole).tolist())
    return {"restored": restored_metric(seen.models, forget, seen.splits.retain)}


def gap(seen: Comparison) -> dict[str, Metric]:
    """Return the average gap to the retrained model, if there is one."""
    if "reference" not in seen.models:
        return {}
    n = len(seen.splits.forget)
    return {"gap": Metric(before=average_gap(seen.found, "before"), after=average_gap(seen.found), n=n)}


def restored_metric(models: Mapping[str, nn.Module], forget: ImageSource, retain: ImageSource) -> Metric:
    """Return `restored`: the share of forgotten images that is recognised with the last layer of the model before.

    An edit of the outputs leaves the features as they were: a bias of -100 hides a class, and the former last layer
    brings it back. Order and scale of the features can be changed without changing any output, so the layer is tried on
    the features as they are and on those that match features before; the larger share counts. `retain` must hold
    nothing of the forgotten classes, so that the match does not depend on them. The metric is null without a linear
    layer or with features that are not finite.
    """
    layers = [module for module in models["before"].modules() if isinstance(module, nn.Linear)]
    labels, shares = forget.labels.cpu(), dict[str, float]()
    kept = retain.select(np.unique(np.linspace(0, len(retain) - 1, _MATCHED).astype(int)).tolist())
    matched_to: Tensor | None = None
    for name, model in models.items() if layers else ():
        asked, seen = _features(model, forget), _features(model, kept)
        matched_to = seen if matched_to is None else matched_to
        share = None
        if asked is not None and seen is not None and matched_to is not None:
            share = restored_share(layers[-1], labels, asked, seen, matched_to)
        if share is None:
            return Metric.of({}, len(forget))
        shares[name] = share
    return share_metric(shares, len(forget))


def restored_share(layer: nn.Linear, labels: Tensor, asked: Tensor, seen: Tensor, wanted: Tensor) -> float | None:
    """Return the share of forgotten images that the last layer of the model before recognises in features after.

    Features after: `asked` [N, D] of the forgotten images and `seen` [M, D] of retained ones; `wanted` [M, D] are
    features before of the latter. The larger share of `restored_metric` counts; None if a feature is not finite.
    """
    if not (torch.isfinite(asked).all() and torch.isfinite(seen).all()):
        return None
    with torch.no_grad():
        layer = copy.deepcopy(layer).cpu()
        found = [layer(features).argmax(dim=1) == labels for features in (asked, _matched(asked, seen, wanted))]
    return max(float(right.double().mean()) for right in found)


def _features(model: nn.Module, images: ImageSource) -> Tensor | None:
    return penultimate_features(model, lambda size: (inputs for inputs, _ in images.batches(size)))


def _matched(asked: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """Return the features `asked` [N, D] in the order and with the scale of another model's.

    `seen` [M, D] and `wanted` [M, D] are features of this and of the other model on the same images. Each feature takes
    the place of the one that it is correlated with, such that the sum of the correlations is largest. A feature that
    resembles no other gets the other's mean, which carries nothing.
    """
    from scipy.optimize import linear_sum_assignment

    deviations = [side.double().std(dim=0, correction=0) for side in (seen, wanted)]
    scores = [
        (side.double() - side.double().mean(dim=0)) / deviation.clamp(min=_CONSTANT)
        for side, deviation in zip((seen, wanted), deviations, strict=True)
    ]
    products = scores[0].T @ scores[1] / len(seen)
    own, place = map(torch.from_numpy, linear_sum_assignment(products.numpy(), maximize=True))
    varies = (deviations[0][own] > _CONSTANT) & (deviations[1][place] > _CONSTANT)
    scale = torch.where(varies, deviations[1][place] / deviations[0][own].clamp(min=_CONSTANT), 1.0)
    same = ~varies | (products[own, place] >= _SAME)
    result = torch.empty_like(asked)
    result[:, place] = torch.where(same, asked[:, own].double() * scale, wanted.double().mean(dim=0)[place]).to(
        asked.dtype
    )
    return result


def metric_shares(by_split: Mapping[str, Outputs]) -> dict[str, np.ndarray]:
    """Return UA, RA, TA, and if all outputs are finite MIA and MIA_entropy, each as one bool per sample.

    The mean over the samples is the metric.
    """
    return _accuracy_shares(by_split) | _attack_shares(by_split)


def _accuracy_shares(by_split: Mapping[str, Outputs]) -> dict[str, np.ndarray]:
    return {
        "UA": ~by_split["forget"].correct,
        "RA": by_split["retain"].correct,
        "TA": by_split["test"].correct,
    }


def _attack_shares(by_split: Mapping[str, Outputs]) -> dict[str, np.ndarray]:
    forget, retain, test = by_split["forget"], by_split["retain"], by_split["test"]
    if not all(np.isfinite(item.probabilities).all() for item in (forget, retain, test)):
        return {}
    return {
        "MIA": confidence_attack(retain, test, forget),
        "MIA_entropy": entropy_attack(retain, test, forget),
    }


def attacks(seen: Comparison) -> dict[str, Metric]:
    """Return MIA and MIA_entropy; null where an output is not finite."""
    shares = {model: _attack_shares(by_split) for model, by_split in seen.kept.items()}
    return {
        name: share_metric(
            {model: float(found[name].mean()) for model, found in shares.items() if name in found},
            len(seen.outputs["after"]["forget"]),
        )
        for name in ("MIA", "MIA_entropy")
    }


def _share_metrics(outputs: ByModel, whole: np.ndarray) -> dict[str, Metric]:
    """UA, RA, TA; UA_class of classes that are forgotten as a whole and UA_samples of the other samples."""
    shares = {model: _accuracy_shares(by_split) for model, by_split in outputs.items()}
    metrics = {}
    for name, split in (("UA", "forget"), ("RA", "retain"), ("TA", "test")):
        values = {model: outputs[model][split].mean(found[name]) for model, found in shares.items()}
        weights = outputs["after"][split].weights
        size = None if weights is None else effective_size(weights)
        metrics[name] = share_metric(values, len(outputs["after"][split]), size)
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
