"""The reference of an evaluation: a model retrained without the forget set."""

from __future__ import annotations

import time

from torch import nn

from salun_core.config import parse
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.method import get_method
from salun_core.tasks.task import EvaluationOptions, InputsT, Task


def reference_model(
    task: Task[InputsT], inputs: InputsT, options: EvaluationOptions, facts: RunFacts
) -> tuple[nn.Module | None, RunFacts]:
    """Return the network of the reference, if requested, and the facts with the seconds of its training.

    Args:
        task: task of the models.
        inputs: the model before, its data and the forget set.
        options: folder of a reference, or whether to retrain one.
        facts: facts of the run under evaluation.
    """
    if options.reference is not None:
        return task.load(options.reference).network, facts
    if not options.retrain:
        return None, facts
    started = time.perf_counter()
    config = task.retrain_config(inputs.original.card, options.device)
    if facts.method == "retrain" and facts.config:  # with its own settings, so that the bits can be compared
        row = get_method(task.methods, facts.method)
        config = parse(row.config_type, {**facts.config, "device": str(options.device)}, "the settings of the run")
    network = task.unlearn(inputs, "retrain", config).model
    seconds = {**facts.seconds, "reference": time.perf_counter() - started}
    return network, facts.model_copy(update={"seconds": seconds})
