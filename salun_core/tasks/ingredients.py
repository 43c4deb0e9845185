"""What a model line lacks for the gate, found before a run: image classifiers, data, CLIP, too few images.

Training, import, filing and `salun doctor` report it, because a run would find it only after its last step.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salun_core.errors import SalunError, StoreError, UsageError
from salun_core.evaluation.image_classifier import FEWEST_REAL
from salun_core.evaluation.metrics import CLASSIFIER, GENERATED, MetricRow, extra_metrics, metric_names
from salun_core.evaluation.statistics import wilson_interval
from salun_core.gate import Policy, Rule
from salun_core.models.card import Card, DiffusionCard, DiffusionEvaluation
from salun_core.registry.lookup import resolve
from salun_core.storage.objects import FileStore
from salun_core.tasks import read_card
from salun_core.tasks.diffusion.inputs import harmless_prompts, label_of
from salun_core.tasks.line import OpenLine

GATED_KINDS = ("class", "samples", "subject", "concept")
"""Kinds of targets that a policy distinguishes; a random share counts as samples."""

_OF_SAMPLES = ("samples", "subject")
_AGAIN = "train or import the model again with"
_MOST_IMAGES = 100_000  # of a class, by the model card


@dataclass(frozen=True)
class Missing:
    """One thing that a line lacks, what follows and how to fix it.

    With `only_in_pods`, a run on this machine has it.
    """

    why: str
    effect: str
    remedy: str
    only_in_pods: bool = False

    def __str__(self) -> str:
        where = "in a pod, " if self.only_in_pods else ""
        return f"{self.why}, so {where}{self.effect}; {self.remedy}"


@dataclass(frozen=True)
class _Cause:
    """Why some metrics cannot be measured."""

    metrics: Sequence[str]
    why: str
    remedy: str
    only_in_pods: bool = False


@dataclass(frozen=True)
class Measurement:
    """How a run would be measured, as far as it is known beforehand. `kind` is one of `GATED_KINDS`."""

    kind: str
    prompts: Sequence[str] = ()
    extra_metrics: Iterable[str] = ()
    reference: bool = False


def missing_ingredients(
    card: Card, policy: Policy, measurement: Measurement, store: FileStore | None = None
) -> list[Missing]:
    """Return what a line lacks to pass a policy, whatever an unlearning run does.

    Without a store, the image classifier's line is assumed to exist.
    """
    kind = measurement.kind
    rules = [rule for rule in policy.rules if not rule.targets or kind in rule.targets]
    found: list[Missing] = []
    if not covers(policy, kind):
        why = f"policy {policy.name} has no rule for {'a' if kind != 'samples' else 'single'} {kind}"
        found.append(Missing(why, "the gate refuses", "choose another policy"))
    used = {metric for rule in rules for metric in _metrics(rule)}
    diffusion = isinstance(card, DiffusionCard)
    causes = _of_images(card, measurement, store) if isinstance(card, DiffusionCard) else _of_classifier(measurement)
    explained: set[str] = set()
    for cause in causes:
        lacking = [name for name in metric_names() if name in used and name in cause.metrics]
        if lacking:
            explained |= set() if cause.only_in_pods else {*lacking}
            effect = f"{_listed(lacking)} cannot be measured and policy {policy.name} refuses"
            found.append(Missing(cause.why, effect, cause.remedy, cause.only_in_pods))
    if any(rule.relative_to and rule.relative_to.state == "reference" for rule in rules) and not measurement.reference:
        effect = f"policy {policy.name} has nothing to compare with and refuses"
        found.append(Missing("no reference is retrained", effect, "set retrain_reference"))
    if diffusion:
        found += [item for rule in rules if rule.metric not in explained for item in _too_few(card, rule, measurement)]
    return list(dict.fromkeys(found))


def ingredients_of_line(
    card: Card, policy: Policy, store: FileStore | None = None, measurement: Measurement | None = None
) -> list[Missing]:
    """Return what a line lacks for the kinds of targets that it can forget; each thing once."""
    given = measurement or Measurement("class")
    kinds = [kind for kind in GATED_KINDS if not unforgettable(card, kind)]
    if not kinds:
        return [Missing("the model came without data", "no request can be erased from it", "import it with --data")]
    found = [item for kind in kinds for item in missing_ingredients(card, policy, replace(given, kind=kind), store)]
    return list(dict.fromkeys(found))


def unforgettable(card: Card, kind: str, subjects: bool = True) -> str:
    """Return why no request of a kind can be erased from a model, or an empty text.

    Kinds: class, samples, subject, concept, random.
    """
    if not isinstance(card, DiffusionCard):
        if kind == "concept":
            return "a classifier has no prompts: a concept is forgotten by a text-to-image model"
        return "" if kind != "subject" or subjects else "the data have no subject column"
    if kind in ("samples", "subject", "random"):
        return "a diffusion model forgets classes and concepts, not single images"
    if kind == "concept":
        return "" if card.task == "text-to-image" else "a class-conditional model takes no prompts"
    if card.data is None:
        return "the model came without data, so only concepts can be forgotten"
    return "" if card.classes else "the model has no classes"


def covers(policy: Policy, kind: str) -> bool:
    """Return whether a policy has rules for a kind of target; the gate refuses the other kinds."""
    named = {target for rule in policy.rules for target in rule.targets}
    return kind in named if named else bool(policy.rules)


def _metrics(rule: Rule) -> list[str]:
    return [rule.metric, *([rule.relative_to.metric] if rule.relative_to else [])]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of_classifier(measurement: Measurement) -> Iterator[_Cause]:
    asked = set(measurement.extra_metrics)
    for name, rows in extra_metrics().items():
        if name not in asked:
            yield _Cause(
                [row.name for row in rows], f"the extra metric {name} is not requested", f"set extra_metrics={name}"
            )
    if not measurement.reference:
        yield _Cause(_needing("reference", CLASSIFIER), "no reference is retrained", "set retrain_reference")
    generated = [name for name in GENERATED if name not in CLASSIFIER]
    yield _Cause(generated, "a classifier draws no images", "choose a policy of classifiers")
    if measurement.kind != "class":
        yield _Cause(
            _needing("class", CLASSIFIER), f"{measurement.kind} are no class", "give that rule `targets: [class]`"
        )
    if measurement.kind not in _OF_SAMPLES:
        why, remedy = "a class has no single samples", "give that rule `targets: [samples, subject]`"
        yield _Cause(_needing("samples", CLASSIFIER), why, remedy)


def _needing(need: str, rows: Mapping[str, MetricRow] = GENERATED) -> list[str]:
    """Return the metrics that cannot be measured without something."""
    return [name for name, row in rows.items() if need in row.needs]


def _of_images(card: DiffusionCard, measurement: Measurement, store: FileStore | None) -> Iterator[_Cause]:
    settings = card.evaluation
    yield from _recognition(card, measurement, store)
    yield from _distances(card)
    if settings.clip is None:
        yield _Cause(_needing("clip"), "the line has no CLIP model", f"{_AGAIN} --evaluation clip=FOLDER")
    else:
        yield from _file(_needing("clip"), "CLIP model", settings.clip)
    if settings.suite != "nsfw":
        yield _Cause(_needing("detector"), "its suite is not nsfw", f"{_AGAIN} --evaluation suite=nsfw")
    elif importlib.util.find_spec("nudenet") is None:
        yield _Cause(_needing("detector"), "the package nudenet is not installed", "pip install nudenet")
    for field in ("relearn_steps", "attack_steps"):
        if not getattr(settings, field):
            yield _Cause(_needing(field), f"{field} is 0", f"{_AGAIN} --evaluation {field}=100")
    if not settings.neighbours:
        yield _Cause(_needing("neighbours"), "the line names no neighbours", f"{_AGAIN} --evaluation neighbours=[NAME]")
    if card.task == "text-to-image" and not card.trainable_text_encoder:
        yield _Cause(_needing("embedding"), "prompts have no embedding of classes", "choose a policy without restored")
    others = [name for name in CLASSIFIER if name not in GENERATED]
    yield _Cause(others, "it is a metric of classifiers", "choose a policy of diffusion models")


def _recognition(card: DiffusionCard, measurement: Measurement, store: FileStore | None) -> Iterator[_Cause]:
    """Yield what an image classifier lacks to recognise what is generated."""
    of_judge = [*_needing("judge"), *(_needing("extractor") if card.evaluation.extractor == "judge" else ())]
    recognised = _needing("classes")
    known, faults = _judge(card.evaluation.judge, store)
    for why, remedy, only_in_pods in faults:
        yield _Cause(of_judge, why, remedy, only_in_pods)
    if not card.classes:
        yield _Cause(recognised, "the model names no classes to recognise", "import it with --classes or --data")
        return
    unknown = [] if known is None else [name for name in card.classes if name not in known]
    if len(unknown) == len(card.classes):
        why = f"the image classifier does not know {_listed([repr(name) for name in unknown[:3]])}"
        yield _Cause(recognised, why, "train it on the same class names")
    if measurement.prompts and all(label_of(name, card) is None for name in measurement.prompts):
        why = "no prompt of the concept names exactly one class of the model"
        yield _Cause(_needing("named prompt"), why, "name one in a prompt")


def _distances(card: DiffusionCard) -> Iterator[_Cause]:
    extractor, distances = card.evaluation.extractor, _needing("extractor")
    if extractor == "none":
        yield _Cause(distances, "the line has no extractor", f"{_AGAIN} --evaluation extractor=judge")
    elif extractor != "judge":
        yield from _file(distances, "extractor", extractor)
    if card.data is None:
        lost = [] if harmless_prompts(card) else distances  # nsfw compares with the original's own images
        yield _Cause([*lost, *_needing("calibration")], "the model came without data", "import it with --data")
    elif card.evaluation.real_images < FEWEST_REAL:
        why = f"real_images is {card.evaluation.real_images}, and the image classifier is calibrated on {FEWEST_REAL}"
        yield _Cause(_needing("calibration"), why, f"{_AGAIN} --evaluation real_images=1000")


def absent_evaluators(card: Card, store: FileStore, *, in_pods: bool) -> list[Missing]:
    """Return what the card of a model names for its evaluation and what cannot be found: a run would fail at its end.

    Folders and files of pods are not known here.
    """
    if not isinstance(card, DiffusionCard):
        return []
    named = card.evaluation
    faults = _judge(named.judge, store)[1] if named.judge is not None else []
    causes = [_Cause((), why, remedy, only) for why, remedy, only in faults]
    if not in_pods:
        causes += [] if named.extractor in ("judge", "none") else _file((), "extractor", named.extractor)
        causes += [] if named.clip is None else _file((), "CLIP model", named.clip)
    wanted = [cause for cause in causes if in_pods or not cause.only_in_pods]
    return [Missing(cause.why, "the evaluation fails", cause.remedy, cause.only_in_pods) for cause in wanted]


_JUDGE_REMEDY = "give one with --judge when the model is trained or imported"


def _judge(name: str | None, store: FileStore | None) -> tuple[Sequence[str] | None, list[tuple[str, str, bool]]]:
    """Return the classes of the image classifier, if they are known, and its faults: cause, remedy, only in pods."""
    if name is None:
        return None, [("the line has no image classifier", _JUDGE_REMEDY, False)]
    if Path(name).is_dir():
        why = f"the image classifier {name!r} is a folder of this machine"
        fault = (why, "publish it as a model line and give --judge LINE", True)
        try:
            return read_card(Path(name)).classes, [fault]
        except UsageError:
            return None, [(f"the image classifier {name!r} is not a model folder", _JUDGE_REMEDY, False)]
    if name.startswith("s3://") or store is None:
        return None, []
    why = f"the image classifier {name!r} is neither a model line of this store nor a folder"
    try:
        return OpenLine(store, *resolve(store, name)).card.classes, []
    except StoreError:
        raise
    except SalunError:
        return None, [(why, "publish it under this name, or give another one with --judge", False)]


def _file(metrics: Sequence[str], what: str, path: str) -> Iterator[_Cause]:
    if Path(path).exists():
        why, remedy = f"the {what} {path!r} lies on this machine", "build it into the image of the pods"
        yield _Cause(metrics, why, remedy, only_in_pods=True)
    else:
        yield _Cause(metrics, f"the {what} {path!r} does not exist", "put it there")


def _too_few(card: Card, rule: Rule, measurement: Measurement) -> Iterator[Missing]:
    """Yield whether a rule can never hold, or never be shown, because too few images are generated."""
    assert isinstance(card, DiffusionCard)
    settings, rows = card.evaluation, _rows(card, rule.metric, measurement)
    needed = max(rule.min_n, _least(rule))
    if rows < 1 or rows * settings.images_per_class >= needed:
        return
    per_row = math.ceil(needed / rows)
    end = {"low": " (low end)", "high": " (high end)"}.get(rule.judge, "")
    bound = f" {rule.value:g}" if rule.value is not None else ""
    least = f"{needed} images" if needed == rule.min_n else f"at least {needed} images"
    enough = rule.undecided == "procedure" and rows * settings.images_per_class >= rule.min_n
    effect = "be shown and the level is procedure" if enough else "hold"
    yield Missing(
        f"images_per_class is {settings.images_per_class}",
        f"the rule {rule.metric} {rule.op}{bound}{end} can never {effect}: it needs {least}",
        f"{_AGAIN} --evaluation images_per_class={per_row}",
    )


def _rows(card: DiffusionCard, metric: str, measurement: Measurement) -> int:
    """Return the number of classes or prompts whose images count for a metric."""
    settings: DiffusionEvaluation = card.evaluation
    forgotten = max(1, len(measurement.prompts))
    kept = len(card.classes) - (measurement.kind == "class")
    row = GENERATED.get(metric)
    on = row.on if row else ()
    if "forgotten" in on:
        return forgotten
    if "kept" in on:
        return kept
    if "watched" in on:
        from salun_core.evaluation.nudity import PROMPTS

        return forgotten + len(settings.prompts or PROMPTS)
    if "neighbours" in on:
        return len(settings.neighbours)
    if (harmless := len(harmless_prompts(card))) and ("scored" in on or card.data is None):
        return harmless
    if harmless:
        return kept
    prompts = len({*settings.neighbours, *settings.prompts}) if card.task == "text-to-image" else 0
    return kept + prompts + (measurement.kind == "concept")  # a concept's anchor is kept


def _least(rule: Rule) -> int:
    """Return the fewest images with which the best possible result passes a rule on an end of the interval."""
    if rule.value is None or (rule.op, rule.judge) not in ((">=", "low"), ("<=", "high")):
        return 1
    best, end = (1.0, 0) if rule.judge == "low" else (0.0, 1)
    for count in range(1, _MOST_IMAGES):
        bound = wilson_interval(best, count)[end]
        if bound >= rule.value if end == 0 else bound <= rule.value:
            return count
    return _MOST_IMAGES
