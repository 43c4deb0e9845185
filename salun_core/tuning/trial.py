"""One trial: an unlearning run that is measured after each epoch, and ends early when it leads nowhere."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors.torch import load as deserialise
from torch import Tensor, nn

from salun_core.data.images import ImageSet
from salun_core.errors import ModelError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.classification import UnlearnConfig, unlearn
from salun_core.saliency import SaliencyMask
from salun_core.tuning.objective import Constraint, Reading, Sets, distance, figures_of, metrics_of

PATIENCE = 2
_PREFIX = "model/"


@dataclass(frozen=True)
class Measured:
    """A model on the way, and what was measured of it.

    Args:
        epoch: epochs that made it.
        state: its weights and buffers.
        figures: for the log.
        distance: what the search makes small; infinite where an output is no number.
        refused: rules of the policy that it breaks.
        value: the distance, and more than 1 on top where a rule is broken.
    """

    epoch: int
    state: dict[str, Tensor]
    figures: dict[str, float]
    distance: float
    refused: list[str]
    value: float


@dataclass(frozen=True)
class CandidateEvaluator:
    """Measures candidates.

    Args:
        model: the original, on the device; its copies hold the candidates.
        sets: what to measure on.
        before: what the original says of them.
        constraint: checks figures against the policy.
    """

    model: nn.Module
    sets: Sets
    before: Reading
    constraint: Constraint

    def measure(self, epoch: int, state: dict[str, Tensor]) -> Measured:
        """Measure a candidate with the original's architecture."""
        candidate = copy.deepcopy(self.model)
        candidate.load_state_dict(state)
        after = self.sets.read(candidate)
        if not after.finite:
            return Measured(epoch, state, {}, float("inf"), ["an output is not a number"], 10.0)
        metrics = metrics_of(self.before, after)
        checked, far = self.constraint(metrics), distance(self.before, after)
        value = far + (1 + checked.shortfall if checked.reasons else 0.0)
        return Measured(epoch, state, figures_of(metrics, after), far, checked.reasons, value)


class Stopped(Exception):  # noqa: N818 - a way out of the loop, no error
    """Ends a trial from within its loop."""


@dataclass
class EpochCallback:
    """Looks at a run after each epoch: a checkpoint store that keeps the last state in memory.

    Args:
        evaluator: measures.
        go_on: says of what was measured last whether the trial may run another epoch.
        last: epochs of the whole trial.
        state: weights after the last epoch.
        seen: what was measured so far.
        history: one record an epoch.
    """

    evaluator: CandidateEvaluator
    go_on: Callable[[Measured], bool]
    last: int
    state: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Measured] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)

    def load(self) -> bytes | None:
        """Return None: a trial starts anew."""
        return None

    def save(self, data: bytes) -> None:
        """Take the weights out of the loop's state."""
        tensors = deserialise(data)
        self.state = {name.removeprefix(_PREFIX): tensors[name] for name in tensors if name.startswith(_PREFIX)}

    def look(self, record: EpochRecord) -> None:
        """Measure, and end the trial where it leads nowhere.

        Raises:
            Stopped: it does.
        """
        self.history.append(record)
        found = self.evaluator.measure(record.epoch, self.state)
        self.seen.append(found)
        more = self.go_on(found) and self._improves()
        if not more and record.epoch < self.last:
            raise Stopped

    def _improves(self) -> bool:
        values = [item.value for item in self.seen]
        return len(values) - 1 - values.index(min(values)) < PATIENCE


@dataclass(frozen=True)
class Trial:
    """What a trial came to.

    Args:
        answers: the models that it offers; none where it failed or was ended before it had one.
        history: one record an epoch.
        readings: models that were measured.
        state: finished, stopped or failed.
        seconds: wall clock.
    """

    answers: list[Measured]
    history: list[EpochRecord]
    readings: int
    state: str
    seconds: float

    @property
    def best(self) -> Measured | None:
        """The answer of the smallest value, of equal ones the earliest."""
        return min(self.answers, key=lambda item: item.value, default=None)


def run_trial(
    method: str,
    config: UnlearnConfig,
    images: tuple[ImageSet, ImageSet],
    mask: SaliencyMask | None,
    callback: EpochCallback,
    growing: bool,
) -> Trial:
    """Run one setting.

    Args:
        method: its name.
        config: resolved.
        images: D_f and D_r.
        mask: for a method that needs one.
        callback: looks at each epoch.
        growing: whether each epoch's model is an answer; otherwise only the last one is measured, for what comes
            before it is no model of a shorter run and says little of the end.

    Returns:
        What it came to. A loss that is not a number makes it a failed trial, not an error.
    """
    started = time.perf_counter()
    forget, retain = images
    evaluator, state = callback.evaluator, "finished"
    answers: list[Measured] = []
    try:
        result = unlearn(
            evaluator.model,
            method,
            forget=forget,
            retain=retain,
            config=config,
            mask=mask,
            checkpoint=callback if growing else None,
            on_epoch=callback.look if growing else callback.history.append,
        )
        if not callback.seen:
            answers = [evaluator.measure(config.epochs, _state(result.model))]
    except Stopped:
        state = "stopped"
    except ModelError:
        state = "failed"
    answers = callback.seen or answers
    return Trial(list(answers), callback.history, len(answers), state, time.perf_counter() - started)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to(torch.device("cpu"), copy=True) for name, tensor in model.state_dict().items()}
