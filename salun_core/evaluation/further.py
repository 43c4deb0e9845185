"""The measurements that are off by default: what they are called, and how they are made together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from salun_core.data.images import ImageSet
from salun_core.errors import UsageError, unknown_name
from salun_core.evaluation.evidence import Evidence, Further, Metric, RelearnPoint
from salun_core.evaluation.likelihood_ratio import FEWEST_SHADOWS, Train, lira_metrics, train_shadows
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.probe import probe_metric
from salun_core.evaluation.reference_distance import kl_metrics, tow_metric
from salun_core.evaluation.relearning import halves, relearn, relearn_metric
from salun_core.evaluation.seeds import run_figures, seed_metrics
from salun_core.evaluation.worst_group import decile_metric, worst_drop_metric

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


def parse_also(text: str) -> dict[str, int]:
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


def measure_further(
    evidence: Evidence, asked: Mapping[str, int], subject: Subject, train: Train, rerun: Rerun, seed: int = 0
) -> Evidence:
    """Add what was asked for to the evidence.

    Args:
        evidence: of the same models.
        asked: from `parse_also`.
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
    further = Further.model_validate({"asked": [name for name in NAMES if name in asked], "seconds": spent, **facts})
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
