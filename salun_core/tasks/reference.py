"""The reference of an evaluation: a model retrained without the forget set."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from salun_core.config import parse
from salun_core.errors import ModelError
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.methods.method import get_method
from salun_core.tasks.task import EvaluationOptions, Inputs, InputsT, Model, Task


def reference_model(
    task: Task[InputsT], inputs: InputsT, options: EvaluationOptions, facts: RunFacts
) -> tuple[nn.Module | None, RunFacts]:
    """Return the network of the reference, if requested, and the facts with the seconds of its training.

    ModelError as for `check_reference`.
    """
    if options.reference is not None:
        reference = task.load(options.reference)
        check_reference(inputs, reference)
        return reference.network, facts
    if not options.retrain:
        return None, facts
    started = time.perf_counter()
    config, group = task.retrain_config(inputs.original.card, options.device), options.group
    if facts.method == "retrain" and facts.config:  # with its own settings, so that the bits can be compared
        row = get_method(task.methods, facts.method)
        config = parse(row.config_type, {**facts.config, "device": str(options.device)}, "the settings of the run")
        if facts.environment.get("processes", "1") != str(group.size):  # else it has other bits
            group = SINGLE_PROCESS
    network = task.unlearn(inputs, "retrain", config, group=group).model
    seconds = {**facts.seconds, "reference": time.perf_counter() - started}
    return network, facts.model_copy(update={"seconds": seconds})


def check_reference(inputs: Inputs[Any], reference: Model, name: str = "the reference") -> None:
    """Check that a reference can be what the original would be without the forget set.

    ModelError: it has another architecture or was trained on other data or on the forget set. Messages call it `name`.
    """
    original, remedy = inputs.original, "give a model that was retrained without the forget set: --method retrain"
    if reference.card.architecture != original.card.architecture or _shapes(reference) != _shapes(original):
        found = f"{reference.card.architecture} instead of {original.card.architecture}, or other shapes"
        raise ModelError(f"{name} has another architecture", found, remedy)
    if reference.split.dataset_digest != inputs.split.dataset_digest:
        raise ModelError(f"{name} was trained on other data", "its split names another data set", remedy)
    if seen := len(reference.split.train.keys() & set(inputs.forget_set.samples)):
        raise ModelError(f"{name} was trained on the forget set", f"on {seen} of its samples", remedy)


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.network.named_parameters()}
