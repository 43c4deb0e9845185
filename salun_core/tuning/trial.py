"""One trial: an unlearning run that is measured after each epoch and stops early without improvement."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors.torch import load as deserialise
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.errors import ModelError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.gate import Cause
from salun_core.methods.classification import UnlearnConfig, unlearn
from salun_core.saliency import SaliencyMask
from salun_core.tuning.objective import Constraint, Reading, Sets, distance, figures_of, metrics_of

PATIENCE = 2  # epochs without improvement before a trial ends: values are noisy from epoch to epoch
_PREFIX = "model/"  # prefix of the weights in the loop's state


@dataclass(frozen=True)
class Measurement:
    """A candidate and its metrics.

    Args:
        epoch: number of epochs that produced it.
        state: its weights and buffers.
        figures: metrics for the log.
        distance: the objective; infinite if an output is not finite.
        refused: rules of the policy that it breaks.
        value: value to minimise: the distance, plus more than 1 if a rule is broken.
        causes: why each of these rules failed, in the same order.
    """

    epoch: int
    state: dict[str, Tensor]
    figures: dict[str, float]
    distance: float
    refused: list[str]
    value: float
    causes: list[Cause] = field(default_factory=list)


@dataclass(frozen=True)
class CandidateEvaluator:
    """Measures candidates.

    Args:
        model: the original, on the device; the candidates are loaded into copies of it.
    """

    model: nn.Module
    sets: Sets
    before: Reading
    constraint: Constraint

    def measure(self, epoch: int, state: dict[str, Tensor]) -> Measurement:
        """Measure a candidate that has the original's architecture."""
        candidate = copy.deepcopy(self.model)
        candidate.load_state_dict(state)
        after = self.sets.read(candidate)
        if not after.finite:
            return Measurement(epoch, state, {}, float("inf"), ["an output is not a number"], 10.0, [Cause.DAMAGED])
        metrics = metrics_of(self.before, after)
        checked, far = self.constraint(metrics), distance(self.before, after)
        value = far + (1 + checked.shortfall if checked.reasons else 0.0)
        figures = figures_of(metrics, after)
        return Measurement(epoch, state, figures, far, checked.reasons, value, checked.causes)


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """Ends a trial from inside its loop."""


@dataclass
class EpochCallback:
    """Measures a run after each epoch. It also serves as the loop's checkpoint store, which gives it the weights.

    A run that was ended goes on from its last epoch if it is started again with the same callback: the loop restores
    weights, optimiser and history, and measures only the epochs that follow.

    Args:
        evaluator: measures candidates.
        go_on: (last measurement) -> whether the trial may run another epoch.
        last: number of epochs of the whole trial.
        state: weights after the last epoch.
        seen: all measurements.
        history: one record per epoch.
        checkpoint: state of the loop after the last epoch.
    """

    evaluator: CandidateEvaluator
    go_on: Callable[[Measurement], bool]
    last: int
    state: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Measurement] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)
    checkpoint: bytes | None = None

    @property
    def improves(self) -> bool:
        """Whether one of the last `PATIENCE` epochs is the best so far."""
        values = [item.value for item in self.seen]
        return len(values) - 1 - values.index(min(values)) < PATIENCE

    def load(self) -> bytes | None:
        """Return the state of the loop after the last epoch; None before the first."""
        return self.checkpoint

    def save(self, data: bytes) -> None:
        """Keep the state of the loop, and read the weights from it."""
        self.checkpoint = data
        tensors = deserialise(data)
        self.state = {name.removeprefix(_PREFIX): tensors[name] for name in tensors if name.startswith(_PREFIX)}

    def look(self, record: EpochRecord) -> None:
        """Measure the epoch; raise `Stopped` if the trial ends before its last epoch.

        The search ends it, or `PATIENCE` epochs pass without improvement.
        """
        self.history.append(record)
        found = self.evaluator.measure(record.epoch, self.state)
        self.seen.append(found)
        if not (self.go_on(found) and self.improves) and record.epoch < self.last:
            raise Stopped


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Args:
        answers: the trial's candidates; empty if it failed or stopped before the first one.
        state: finished, stopped or failed.
    """

    answers: list[Measurement]
    history: list[EpochRecord]
    state: str
    seconds: float

    @property
    def best(self) -> Measurement | None:
        """The candidate with the smallest value; the earliest one in a tie."""
        return min(self.answers, key=lambda item: item.value, default=None)


def run_trial(
    method: str,
    config: UnlearnConfig,
    images: tuple[ImageSource, ImageSource],
    mask: SaliencyMask | None,
    callback: EpochCallback,
    growing: bool,
    held_out: ImageSource | None = None,
) -> Trial:
    """Run one setting; a non-finite loss gives a failed trial, not an error.

    `growing` is whether each epoch's model is a candidate. Otherwise only the last model is measured, because an
    earlier one is not the result of a shorter run and does not predict the last one. `images` are D_f and D_r;
    `held_out` is for a method that measures the original on it.
    """
    started = time.perf_counter()
    forget, retain = images
    evaluator, state = callback.evaluator, "finished"
    answers: list[Measurement] = []
    try:
        result = unlearn(
            evaluator.model,
            method,
            forget=forget,
            retain=retain,
            config=config,
            mask=mask,
            held_out=held_out,
            checkpoint=callback if growing else None,
            on_epoch=callback.look if growing else callback.history.append,
        )
        if not callback.seen:
            weights = result.model.state_dict().items()
            kept = {name: tensor.detach().to(torch.device("cpu"), copy=True) for name, tensor in weights}
            answers = [evaluator.measure(config.epochs, kept)]
    except Stopped:
        state = "stopped"
    except ModelError:
        state = "failed"
    return Trial(callback.seen or answers, callback.history, state, time.perf_counter() - started)
