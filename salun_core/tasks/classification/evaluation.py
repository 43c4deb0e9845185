"""Evaluation of a classifier: the default metrics and the optional ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from salun_core import plugins
from salun_core.data import ImageSource
from salun_core.data.stream import decode_together
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.classifier import split_outputs, with_populations
from salun_core.evaluation.evidence import RunFacts
from salun_core.evaluation.optional_metrics import MeasuredModels, measure_optional_metrics, require_reference
from salun_core.evaluation.outputs import Outputs
from salun_core.methods.classification import METHODS, method_config
from salun_core.methods.classification.training import train_classifier
from salun_core.methods.method import get_method
from salun_core.tasks.classification.inputs import ClassifierInputs
from salun_core.tasks.reference import reference_model
from salun_core.tasks.task import Candidate, EvaluationOptions

if TYPE_CHECKING:
    from salun_core.tasks.classification import ClassificationTask


def evaluate(
    task: ClassificationTask, inputs: ClassifierInputs, candidate: Candidate, options: EvaluationOptions
) -> Evidence:
    """Measure a classifier before and after unlearning, and a retrained one if requested."""
    asked = options.optional_metrics
    require_reference(asked, options.retrain or options.reference is not None)
    seen = compared(task, inputs, candidate, options)
    models = seen.models
    evidence = evaluate_classifier(
        models["before"],
        models["after"],
        seen.splits,
        inputs.measured(candidate, models.get("reference")),
        inputs.forgotten(),
        models.get("reference"),
        candidate.mask,
        inputs.original.card.classes,
        seen.facts,
        seen.outputs,
    )
    return _optional(task, inputs, candidate, options, evidence, seen) if asked else evidence


@dataclass(frozen=True)
class Compared:
    """The models of an evaluation (before, after, perhaps reference), and the outputs of each on each split.

    The facts include the seconds of the reference's training.
    """

    models: dict[str, nn.Module]
    splits: Splits
    outputs: dict[str, dict[str, Outputs]]
    facts: RunFacts


def compared(
    task: ClassificationTask, inputs: ClassifierInputs, candidate: Candidate, options: EvaluationOptions
) -> Compared:
    """Return the outputs of all models on all splits, or on samples of them; the options' processes share the work.

    Every process of the group calls it with the same arguments.
    """
    reference, facts = reference_model(task, inputs, options, candidate.facts)
    forget, retain, test = (images.to(options.device) for images in (inputs.forget, inputs.retain, inputs.test))
    splits = Splits(forget, retain, test).sampled(options.samples, inputs.measured(candidate, None))
    if options.group.size == 1:  # of several processes, each decodes its own shares
        decode_together([splits.forget, splits.retain, splits.test])
    named = {"before": inputs.original.model, "after": candidate.model.model} | (
        {"reference": reference.eval()} if reference else {}
    )
    models = {name: model.to(options.device) for name, model in named.items()}
    outputs = {name: split_outputs(model, splits, options.group) for name, model in models.items()}
    return Compared(models, splits, outputs, facts)


def _optional(
    task: ClassificationTask,
    inputs: ClassifierInputs,
    candidate: Candidate,
    options: EvaluationOptions,
    evidence: Evidence,
    seen: Compared,
) -> Evidence:
    """Measure the optional metrics: provide shadow models and repeated runs to them."""
    run, card, device = candidate.facts, inputs.original.card, options.device
    repeatable = run.method in METHODS or plugins.find("method", run.method) is not None
    if "seeds" in options.optional_metrics and not repeatable:
        raise UsageError("the unlearning cannot be repeated", "its run.json is not known", "leave `seeds` out")
    gone = set(evidence.forgotten.classes)
    splits = seen.splits
    kept = [index for index, label in enumerate(splits.test.labels.tolist()) if label not in gone]
    weights = {name: values[kept] if name == "test" else values for name, values in splits.weights.items()}
    whole = inputs.retain.to(device)
    subject = MeasuredModels(seen.models, splits.forget, splits.retain, splits.test.select(kept), weights, whole)

    def train_shadow(images: ImageSource, seed: int) -> nn.Module:
        """Train a shadow model by the recipe on the model card, which an attacker is assumed to know."""
        changes = {"device": str(device), "batch_norm": "update", "seed": seed}
        config = method_config("retrain", {**card.training, **changes})
        return train_classifier(card.architecture, images, len(card.classes), config)[0]

    def run_again(seed: int) -> nn.Module:
        row = get_method(METHODS, run.method)
        config = row.config_type.model_validate({**run.config, "seed": seed, "device": str(device), "sharding": "none"})
        mask = candidate.mask if row.needs_mask else None
        return task.unlearn(inputs, run.method, config, mask).model

    asked = options.optional_metrics
    found = measure_optional_metrics(evidence, asked, subject, train_shadow, run_again, run.seed or 0)
    return found.model_copy(update={"metrics": with_populations(found.metrics, splits.sampling)})
