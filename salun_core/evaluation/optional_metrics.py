"""Metrics that are off by default, because they cost a multiple of the others or need a retrained model.

Each name that switches some of them on has its functions; the last part parses a request for some of them and measures
them. The likelihood-ratio attack has its own module.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from salun_core import plugins
from salun_core.data.images import ImageSource
from salun_core.errors import UsageError, unknown_name
from salun_core.evaluation.evidence import ClassAccuracy, Evidence, Metric, OptionalMetricFacts, RelearnPoint
from salun_core.evaluation.likelihood_ratio import FEWEST_SHADOWS, Train, lira_metrics, train_shadows
from salun_core.evaluation.membership import match_classes, matched_area
from salun_core.evaluation.metrics import ADDED, MetricRow, extra_metrics, find_row, functions_of
from salun_core.evaluation.outputs import TINY, Outputs, outputs_of, penultimate_features
from salun_core.evaluation.statistics import (
    Z95,
    area_metric,
    effective_size,
    mean_interval,
    placements,
    rank_area,
    share_metric,
)

_COUNTS = {"lira": (8, FEWEST_SHADOWS), "relearn": (20, 1), "seeds": (3, 2)}  # default and minimum of NAME=COUNT

BySplit = Mapping[str, Outputs]
"""Split (forget, retain, test) -> outputs of one model."""

# relearn: how fast does a model that is trained on one half of the forget set regain its accuracy on the other half?

LEARNING_RATE, MOMENTUM, BATCH = 0.003, 0.9, 64
_POINTS = 10  # of the curve, besides the start: each costs a forward pass over half of D_f


def halves(forget: ImageSource, seed: int) -> tuple[ImageSource, ImageSource]:
    """Divide D_f at random into images to train on and images to measure on; the first half is the smaller one."""
    order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed))
    middle = len(forget) // 2
    return forget.select(order[:middle]), forget.select(order[middle:])


def relearn(
    model: nn.Module, trained_on: ImageSource, measured_on: ImageSource, steps: int, seed: int
) -> list[RelearnPoint]:
    """Fine-tune a copy on some forgotten images and measure the accuracy on others.

    The accuracy is a ratio, at up to eleven steps from 0 to the last. SGD at 0.003 with momentum 0.9, batches of 64
    with true labels, no augmentation. Batch-norm statistics are frozen: new ones alone would change the accuracy.
    `seed` sets the order.
    """
    learner = copy.deepcopy(model).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(learner.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)

    def point(step: int) -> RelearnPoint:
        return RelearnPoint(step=step, accuracy=float(outputs_of(learner, measured_on).correct.mean()))

    points, every = [point(0)], -(-steps // _POINTS)
    batches = (batch for _ in count() for batch in trained_on.batches(BATCH, generator))
    for done, (images, labels) in enumerate(islice(batches, steps), start=1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(learner(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if done % every == 0 or done == steps:
            points.append(point(done))
    return points


# probe: do the features in front of the last layer still tell the forget set from unseen data?

_FOLDS = 5


def probe_scores(
    positives: np.ndarray, negatives: np.ndarray, seed: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Score each row by a logistic regression that was fitted without it: float64 [N + M], high for rows like D_f.

    `positives` are features of D_f, float64 [N, D]; `negatives` of unseen data, float64 [M, D], with `weights`.

    Source:
        Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2016.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.concatenate([positives, negatives])
    truth = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    shares = np.concatenate([np.ones(len(positives)), np.ones(len(negatives)) if weights is None else weights])
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced"))
    given = {"logisticregression__sample_weight": shares}
    found = cross_val_predict(fit, rows, truth, cv=folds, method="decision_function", params=given)
    return np.asarray(found)


def probe_metric(models: Mapping[str, nn.Module], forget: ImageSource, unseen: ImageSource, seed: int) -> Metric:
    """Return `probe_auc`: the area of telling D_f from unseen data by a linear probe, with five folds.

    Unseen images of retained classes are weighted to the classes of D_f. Null if either set has fewer than five images,
    or a model has no linear layer or NaN features.
    """
    areas: dict[str, float] = {}
    if min(len(forget), len(unseen)) < _FOLDS:
        return Metric.of({}, len(forget))
    weights = match_classes(forget.labels.cpu().numpy(), unseen.labels.cpu().numpy()).weights
    for name, model in models.items():
        found = [penultimate_features(model, partial(_inputs, images)) for images in (forget, unseen)]
        if found[0] is None or found[1] is None or not torch.isfinite(found[0]).all():
            return Metric.of({}, len(forget))
        scores = probe_scores(found[0].double().numpy(), found[1].double().numpy(), seed, weights)
        areas[name] = rank_area(scores[: len(forget)], scores[len(forget) :], weights)
    return area_metric(areas, len(forget), effective_size(weights))


def _inputs(images: ImageSource, size: int) -> Iterator[Tensor]:
    return (inputs for inputs, _ in images.batches(size))


# decile: the most familiar samples and the class that lost most, which means hide

DECILE = 0.1


def familiar_share(forget: Outputs, test: Outputs) -> float:
    """Return the share of D_f whose margin is above that of nine tenths of unseen data of the same classes.

    It is the attack's true positive rate at a false positive rate of 10 %: 0.1 if D_f is like unseen data.
    """
    chosen, weights = match_classes(forget.labels, test.labels)
    above = 1 - placements(forget.margins[chosen], test.margins, weights)
    return float((above < DECILE).mean())


def decile_metric(outputs: Mapping[str, BySplit]) -> Metric:
    """Return `worst_decile`: `familiar_share` by model, with Wilson's interval for a given threshold."""
    values = {model: familiar_share(by["forget"], by["test"]) for model, by in outputs.items()}
    return share_metric(values, len(outputs["after"]["forget"]))


def worst_drop_metric(per_class: Sequence[ClassAccuracy], forgotten: Sequence[int]) -> Metric:
    """Return `worst_class_drop`: the largest loss of test accuracy of a retained class, as a ratio.

    Classes in `forgotten` are left out; n is the number of test images of the class that lost most. Null if no class
    was measured.
    """
    drops = [
        (row.before - row.after, row.n)
        for row in per_class
        if row.before is not None and row.after is not None and row.class_id not in forgotten
    ]
    drop, n = max(drops, default=(None, 0))
    return Metric.of({"before": 0.0, "after": drop} if drops else {}, n)


# kl and tow: the distance to the retrained model


def kl_divergences(reference: Outputs, model: Outputs) -> np.ndarray:
    """Return KL(reference || model) of each sample: sum_k r_k (log r_k - log p_k), float64 [N], in nats.

    Source:
        Kullback & Leibler, "On Information and Sufficiency", Annals of Mathematical Statistics 1951.
    """
    r, p = reference.probabilities, model.probabilities
    terms = r * (np.log(np.clip(r, TINY, 1)) - np.log(np.clip(p, TINY, 1)))
    return np.asarray(terms.sum(axis=1))


def kl_metrics(outputs: Mapping[str, BySplit]) -> dict[str, Metric]:
    """Return KL_forget and KL_test: the mean divergence from the reference, in nats, with a normal interval.

    Null without a reference, or if a divergence is not finite.
    """
    metrics = {f"KL_{split}": Metric.of({}, len(outputs["after"][split])) for split in ("forget", "test")}
    for split in ("forget", "test") if "reference" in outputs else ():
        before, after = (
            kl_divergences(outputs["reference"][split], outputs[model][split]) for model in ("before", "after")
        )
        if np.isfinite(after).all():
            measured = outputs["after"][split]
            mean, n = measured.mean(after), len(after)
            size = n if measured.weights is None else effective_size(measured.weights)
            half = Z95 * math.sqrt(measured.mean((after - mean) ** 2) / (size - 1)) if n > 1 else None
            interval = (None, None) if half is None else (max(0.0, mean - half), mean + half)  # it is never below 0
            values = {"before": measured.mean(before), "after": mean, "reference": 0.0}
            metrics[f"KL_{split}"] = Metric.of(values, n, interval)
    return metrics


def tug_of_war(reference: BySplit, model: BySplit) -> float:
    """Return ToW: the product over forget, retain and test of 1 - |accuracy - the retrained model's|.

    Source:
        Zhao et al., "What makes unlearning hard and what to do about it", NeurIPS 2024, section 3.
    """
    splits = ("forget", "retain", "test")
    return math.prod(1 - abs(model[s].accuracy - reference[s].accuracy) for s in splits)


def tow_metric(outputs: Mapping[str, BySplit]) -> Metric:
    """Return ToW of the models before and after; without a reference both are null."""
    n = len(outputs["after"]["forget"])
    if "reference" not in outputs:
        return Metric.of({}, n)
    values = {model: tug_of_war(outputs["reference"], outputs[model]) for model in ("before", "after")}
    return Metric.of({**values, "reference": 1.0}, n)


# seeds: means over repeated runs of the unlearning


def run_figures(outputs: BySplit) -> dict[str, float]:
    """Return UA, RA, TA of one model, and attack_auc unless all classes of D_f are forgotten as a whole."""
    forget, retain, test = outputs["forget"], outputs["retain"], outputs["test"]
    figures = {
        "UA": float(1 - forget.correct.mean()),
        "RA": retain.accuracy,
        "TA": test.accuracy,
    }
    if np.isin(forget.labels, test.labels).any():
        figures["attack_auc"] = matched_area(forget, test)
    return figures


def seed_metrics(before: Mapping[str, float], runs: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    """Return UA_seeds and so on: means over the runs with their intervals; n is the number of runs.

    `runs` has at least two, including that of the evaluated model.
    """
    found = {}
    for name, first in before.items():
        values = [run[name] for run in runs]
        means = {"before": first, "after": float(np.mean(values))}
        found[f"{name}_seeds"] = Metric.of(means, len(values), mean_interval(values))
    return found


Rerun = Callable[[int], nn.Module]
"""seed -> the model that the same unlearning yields with that seed, on the images' device."""


@dataclass(frozen=True)
class MeasuredModels:
    """The models and images to measure.

    Args:
        models: by name: before, after, perhaps reference; on the images' device.
        forget: D_f.
        retain: D_r, or a sample of it.
        unseen: test images of the retained classes, or a sample of them.
        weights: of the images of a sample, by split: retain, test.
        trained_on: all of D_r, for models that are trained; `retain` by default.
    """

    models: Mapping[str, nn.Module]
    forget: ImageSource
    retain: ImageSource
    unseen: ImageSource
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    trained_on: ImageSource | None = None

    def outputs(self, model: nn.Module) -> dict[str, Outputs]:
        """Run a model on each set of images."""
        splits = {"forget": self.forget, "retain": self.retain, "test": self.unseen}
        found = {name: outputs_of(model, images) for name, images in splits.items()}
        return {name: replace(item, weights=self.weights.get(name)) for name, item in found.items()}


@dataclass(frozen=True)
class AddedMetric:
    """A metric of a plug-in, offered as an entry point of the group `salun.metrics`.

    Args:
        measure: (models and images, seed) -> the metric, which the evidence has under the name of the plug-in. It must
            change neither, and depend on nothing else.
        row: title, meaning and unit, for the report that is written with the evidence.
    """

    measure: Callable[[MeasuredModels, int], Metric]
    row: MetricRow = MetricRow()


@dataclass(frozen=True)
class AddedAttack:
    """A membership attack of a plug-in, offered as an entry point of the group `salun.attacks`.

    Args:
        scores: (outputs on D_r, on unseen data, on D_f) -> scores of D_f, float64 [N], and of the unseen data,
            float64 [M], high for a sample that looks like training data. The evidence has their area, matched by
            class, under the name of the plug-in: 1/2 means that the attack cannot tell the two apart.
        row: as for `AddedMetric`.
    """

    scores: Callable[[Outputs, Outputs, Outputs], tuple[np.ndarray, np.ndarray]]
    row: MetricRow = MetricRow()


def added(name: str) -> AddedMetric | AddedAttack | None:
    """Return the metric or the attack of a plug-in that the operator allows; None if no package offers the name."""
    if plugins.is_reference(name):
        found = plugins.load("metric", name)
        if isinstance(found, AddedAttack):
            return cast("AddedAttack", plugins.load("attack", name))
        if not isinstance(found, AddedMetric):
            raise plugins.wrong_type("metric", name, found, "an AddedMetric or an AddedAttack")
        return found
    metric, attack = plugins.find("metric", name), plugins.find("attack", name)
    if find_row(name) and (offer := metric or attack):
        raise UsageError(
            f"metric {name} of {offer.distribution} cannot be used",
            "a built-in metric has this name",
            f"rename the entry point, or write {offer.target}",
        )
    if metric and attack:
        raise UsageError(
            f"metric {name} is ambiguous",
            "a metric and an attack have this name",
            f"write {metric.target} or {attack.target}",
        )
    kind, row = ("attack", AddedAttack) if attack else ("metric", AddedMetric)
    found = plugins.load(cast("plugins.Kind", kind), name)
    if found is not None and not isinstance(found, row):
        raise plugins.wrong_type(cast("plugins.Kind", kind), name, found, f"an {row.__name__}")
    return found


def measure_added(
    row: AddedMetric | AddedAttack, name: str, subject: MeasuredModels, outputs: Mapping[str, BySplit], seed: int
) -> Metric:
    """Measure the metric of a plug-in, or the area of its attack, and keep its row for the report.

    Torch's own generator is seeded with `seed` as well. If the plug-in's code fails or returns something of another
    form, it is a `UsageError`.
    """
    ADDED[name] = replace(row.row, name=name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(row, AddedAttack):
                return _attack_metric(row, outputs)
            found = row.measure(subject, seed)
    except Exception as error:  # any code
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise UsageError(f"metric {name} cannot be measured", why, "correct the code of the plug-in") from error
    if not isinstance(found, Metric):
        raise UsageError(
            f"metric {name} cannot be measured", f"it returned a {type(found).__name__}", "return a Metric"
        )
    return found


def _attack_metric(row: AddedAttack, outputs: Mapping[str, BySplit]) -> Metric:
    areas = {}
    for model, by in outputs.items():
        forget, unseen = by["forget"], by["test"]
        members, others = (np.asarray(item, dtype=np.float64) for item in row.scores(by["retain"], unseen, forget))
        if members.shape != (len(forget),) or others.shape != (len(unseen),):
            raise ValueError(f"scores of {members.shape} and {others.shape}, not ({len(forget)},) and ({len(unseen)},)")
        if not (np.isfinite(members).all() and np.isfinite(others).all()):
            raise ValueError("a score is not a finite number")
        chosen, weights = match_classes(forget.labels, unseen.labels)
        areas[model] = rank_area(members[chosen], others, weights)
    return area_metric(areas, int(chosen.sum()), effective_size(weights))


def parse_optional_metrics(text: str) -> dict[str, int]:
    """Parse a list of optional metrics such as `lira=16,relearn,probe` into counts by name, 1 for metrics without one.

    `lira=N` shadow models, `relearn=N` steps, `seeds=N` runs. Other names are those of plug-ins.
    """
    found: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, given, number = item.partition("=")
        if name not in extra_metrics() and added(name) is None:
            offered = [offer.name for kind in ("metric", "attack") for offer in plugins.offers(kind)]
            raise unknown_name("metric", name, [*extra_metrics(), *offered])
        if given and name not in _COUNTS:
            raise UsageError(f"{item} is not a metric", f"{name} takes no count", f"write {name}")
        found[name], least = _COUNTS.get(name, (1, 1))
        if given:
            if not number.isdecimal() or int(number) < least or (name == "lira" and int(number) % 2):
                even = "an even number" if name == "lira" else "a whole number"
                raise UsageError(
                    f"{item} is out of range", "fewer are too few to show anything", f"give {even} of at least {least}"
                )
            found[name] = int(number)
    return found


def require_reference(requested: Mapping[str, int], given: bool) -> None:
    """Check that the metrics that compare with a retrained model have one; otherwise `UsageError` with their names."""
    lacking = [
        name
        for name, rows in extra_metrics().items()
        if name in requested and any("reference" in row.needs for row in rows)
    ]
    if lacking and not given:
        raise UsageError(
            f"{' and '.join(lacking)} cannot be measured", "there is no retrained model", "retrain or give a reference"
        )


@dataclass(frozen=True)
class OptionalMeasurement:
    """What the optional metrics are computed from.

    Args:
        requested: from `parse_optional_metrics`.
        train: trains a shadow model from fresh weights.
        rerun: repeats the unlearning with another seed.
        seed: of halves, folds and shadow models; the first of the repeated runs.
        facts: how it was measured, for the evidence.
    """

    evidence: Evidence
    requested: Mapping[str, int]
    subject: MeasuredModels
    outputs: Mapping[str, BySplit]
    train: Train
    rerun: Rerun
    seed: int
    facts: dict[str, object] = field(default_factory=dict)


def measure_optional_metrics(
    evidence: Evidence, requested: Mapping[str, int], subject: MeasuredModels, train: Train, rerun: Rerun, seed: int = 0
) -> Evidence:
    """Return the evidence with the requested metrics and with how they were measured.

    `train` trains a shadow model from fresh weights; `rerun` repeats the unlearning with another seed. `seed` is that
    of halves, folds and shadow models, and the first of the repeated runs.
    """
    started = time.perf_counter()
    outputs = {name: subject.outputs(model) for name, model in subject.models.items()}
    asked = OptionalMeasurement(evidence, requested, subject, outputs, train, rerun, seed)
    metrics: dict[str, Metric] = {}
    known, added_names = extra_metrics(), sorted(set(requested) - set(extra_metrics()))
    for measure in functions_of(row for name, rows in known.items() if name in requested for row in rows):
        metrics |= measure(asked)
    for name in added_names:
        row = added(name)
        assert row is not None  # it was found when the request was parsed
        metrics[name] = measure_added(row, name, subject, outputs, seed)
    names = [*(name for name in known if name in requested), *added_names]
    facts = {**asked.facts, "asked": names, "seconds": time.perf_counter() - started}
    further = OptionalMetricFacts.model_validate(facts)
    return evidence.model_copy(update={"metrics": {**evidence.metrics, **metrics}, "further": further})


# the functions of the table


def decile(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return worst_decile and worst_class_drop."""
    drop = worst_drop_metric(asked.evidence.per_class, asked.evidence.forgotten.classes)
    return {"worst_decile": decile_metric(asked.outputs), "worst_class_drop": drop}


def divergence(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return KL_forget and KL_test."""
    return kl_metrics(asked.outputs)


def tow(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return ToW."""
    return {"ToW": tow_metric(asked.outputs)}


def probe(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return probe_auc."""
    subject = asked.subject
    return {"probe_auc": probe_metric(subject.models, subject.forget, subject.unseen, asked.seed)}


def relearning(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return relearn, and keep its curves."""
    subject, curves, n = asked.subject, dict[str, list[RelearnPoint]](), 0
    if len(subject.forget) > 1:
        sets, steps = halves(subject.forget, asked.seed), asked.requested["relearn"]
        curves = {name: relearn(model, *sets, steps, asked.seed) for name, model in subject.models.items()}
        n = len(sets[1])
    asked.facts["relearning"] = curves
    return {"relearn": share_metric({name: points[-1].accuracy for name, points in curves.items()}, n)}


def lira(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return lira_auc, lira_offline_auc and lira_tpr."""
    subject, shadow_models = asked.subject, asked.requested["lira"]
    # As many unseen images as forgotten ones, or all of them if there are fewer.
    members = len(subject.forget)
    order = np.random.default_rng(asked.seed).permutation(len(subject.unseen))[:members]
    pool = subject.forget.joined(subject.unseen.select(order.tolist()))
    shadows = train_shadows(asked.train, subject.trained_on or subject.retain, pool, shadow_models, asked.seed)
    asked.facts.update(shadow_models=shadow_models, unseen=len(order))
    return lira_metrics(subject.models, shadows, pool, members)


def several_seeds(asked: OptionalMeasurement) -> dict[str, Metric]:
    """Return UA_seeds and so on."""
    seeds = [asked.seed + number for number in range(asked.requested["seeds"])]
    others = (run_figures(asked.subject.outputs(asked.rerun(other))) for other in seeds[1:])
    asked.facts["seeds"] = seeds
    return seed_metrics(run_figures(asked.outputs["before"]), [run_figures(asked.outputs["after"]), *others])
