"""Optional metrics: worst group, distance to a retrained model, spread over seeds, and their selection."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from salun_core.data.images import ImageSet
from salun_core.errors import UsageError, unknown_name
from salun_core.evaluation.evidence import ClassAccuracy, Evidence, Metric, OptionalMetricFacts, RelearnPoint
from salun_core.evaluation.likelihood_ratio import FEWEST_SHADOWS, Train, lira_metrics, train_shadows
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.probe import probe_metric
from salun_core.evaluation.relearning import halves, relearn, relearn_metric
from salun_core.evaluation.statistics import rank_area, wilson_interval

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


SEED_METRICS = ("UA", "RA", "TA", "attack_auc")


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
    for name in SEED_METRICS:
        values = [run[name] for run in runs]
        low, high = mean_interval(values)
        mean = float(np.mean(values))
        found[f"{name}_seeds"] = Metric(before=before[name], after=mean, n=len(values), low=low, high=high)
    return found


NAMES = ("lira", "relearn", "probe", "decile", "kl", "tow", "seeds")
COUNTS = {"lira": 8, "relearn": 20, "seeds": 3}
_FEWEST = {"lira": FEWEST_SHADOWS, "relearn": 1, "seeds": 2}
_NEED_REFERENCE = ("kl", "tow")

Rerun = Callable[[int], nn.Module]
"""seed -> the model that the same unlearning gives with that seed, on the images' device."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        models: by name: before, after, perhaps reference; on the images' device.
        forget: D_f.
        retain: D_r.
        unseen: test images of the classes that are kept.
    """

    models: Mapping[str, nn.Module]
    forget: ImageSet
    retain: ImageSet
    unseen: ImageSet


def parse_optional_metrics(text: str) -> dict[str, int]:
    """Read which measurements are asked for, such as `lira=16,relearn,probe`.

    Args:
        text: names, parted by commas; `lira=N` shadow models, `relearn=N` steps, `seeds=N` runs.

    Returns:
        The count by name, 1 for those that have none; empty for an empty text.

    Raises:
        UsageError: an unknown name (with the nearest match), or a count that it cannot have.
    """
    found: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, given, number = item.partition("=")
        if name not in NAMES:
            raise unknown_name("measurement", name, NAMES)
        found[name] = _count(name, number) if given else COUNTS.get(name, 1)
    return found


def _count(name: str, text: str) -> int:
    least = _FEWEST.get(name)
    if least is None:
        raise UsageError(f"{name}={text} is no measurement", f"{name} counts nothing", f"write {name}")
    if not text.isdecimal() or int(text) < least or (name == "lira" and int(text) % 2):
        even = "an even number" if name == "lira" else "a whole number"
        raise UsageError(f"{name}={text} is out of range", "too few prove nothing", f"give {even} of at least {least}")
    return int(text)


def require_reference(asked: Mapping[str, int], given: bool) -> None:
    """Refuse measurements against a retrained model where there is none.

    Raises:
        UsageError: with their names.
    """
    lacking = [name for name in _NEED_REFERENCE if name in asked]
    if lacking and not given:
        raise UsageError(
            f"{' and '.join(lacking)} cannot be measured", "there is no retrained model", "retrain or give a reference"
        )


def measure_optional_metrics(
    evidence: Evidence, asked: Mapping[str, int], subject: Subject, train: Train, rerun: Rerun, seed: int = 0
) -> Evidence:
    """Add what was asked for to the evidence.

    Args:
        evidence: of the same models.
        asked: from `parse_optional_metrics`.
        subject: models and images.
        train: trains a shadow model from fresh weights.
        rerun: repeats the unlearning with another seed.
        seed: of halves, folds and shadow models; the first of the repeated runs.

    Returns:
        The evidence with more metrics and with how they were made.
    """
    started = time.perf_counter()
    classes = evidence.forgotten.classes
    metrics: dict[str, Metric] = {}
    facts: dict[str, object] = {}
    outputs = {name: _outputs(model, subject) for name, model in subject.models.items()}
    if "decile" in asked:
        metrics["worst_decile"] = decile_metric(outputs)
        metrics["worst_class_drop"] = worst_drop_metric(evidence.per_class, classes)
    if "kl" in asked:
        metrics |= kl_metrics(outputs)
    if "tow" in asked:
        metrics["ToW"] = tow_metric(outputs)
    if "probe" in asked:
        metrics["probe_auc"] = probe_metric(subject.models, subject.forget, subject.unseen, seed)
    if "relearn" in asked:
        curves, n = _relearned(subject, asked["relearn"], seed)
        metrics["relearn"] = relearn_metric(curves, n)
        facts["relearning"] = curves
    if "lira" in asked:
        found, unseen = _attacked(subject, asked["lira"], train, seed)
        metrics |= found
        facts |= {"shadow_models": asked["lira"], "unseen": unseen}
    if "seeds" in asked:
        seeds = [seed + number for number in range(asked["seeds"])]
        runs = [run_figures(outputs["after"])] + [run_figures(_outputs(rerun(item), subject)) for item in seeds[1:]]
        metrics |= seed_metrics(run_figures(outputs["before"]), runs)
        facts["seeds"] = seeds
    spent = time.perf_counter() - started
    further = OptionalMetricFacts.model_validate(
        {"asked": [name for name in NAMES if name in asked], "seconds": spent, **facts}
    )
    return evidence.model_copy(update={"metrics": {**evidence.metrics, **metrics}, "further": further})


def _outputs(model: nn.Module, subject: Subject) -> dict[str, Outputs]:
    splits = {"forget": subject.forget, "retain": subject.retain, "test": subject.unseen}
    return {name: outputs_of(model, images) for name, images in splits.items()}


def _relearned(subject: Subject, steps: int, seed: int) -> tuple[dict[str, list[RelearnPoint]], int]:
    if len(subject.forget) < 2:
        return {}, 0
    taught, asked = halves(subject.forget, seed)
    curves = {name: relearn(model, taught, asked, steps, seed) for name, model in subject.models.items()}
    return curves, len(asked)


def _attacked(subject: Subject, shadows: int, train: Train, seed: int) -> tuple[dict[str, Metric], int]:
    """Attack with as many unseen images as forgotten ones, or all of them where there are fewer."""
    members = len(subject.forget)
    order = np.random.default_rng(seed).permutation(len(subject.unseen))[:members]
    unseen = subject.unseen.select(order.tolist())
    pool = subject.forget.joined(unseen)
    trained = train_shadows(train, subject.retain, pool, shadows, seed)
    return lira_metrics(subject.models, trained, pool, members), len(unseen)
