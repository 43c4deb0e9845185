"""When a trial ends early, and what it answers then."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save

from salun_core.evaluation.evidence import EpochRecord
from salun_core.gate import Cause
from salun_core.methods.classification import METHODS, method_config
from salun_core.tuning.objective import ConstraintResult, Sets
from salun_core.tuning.trial import CandidateEvaluator, EpochCallback, Measurement, Stopped, run_trial
from tests.support.by_hand import image_set, net


@dataclass
class Told:
    """A evaluator that reads the value off the weights."""

    def measure(self, epoch, state):
        value = float(state["w"])
        return Measurement(epoch, state, {}, value, [], value)


def epochs_of(values, last, go_on=lambda found: True):
    """Let a callback see one value an epoch; return it with the epochs that it let pass."""
    callback = EpochCallback(Told(), go_on, last)
    for epoch, value in enumerate(values, 1):
        callback.save(save({"model/w": torch.tensor(value), "optimizer/0/momentum": torch.zeros(1)}))
        try:
            callback.look(EpochRecord(epoch=epoch, learning_rate=0.1, losses={}, seconds=0.0))
        except Stopped:
            return callback, epoch
    return callback, None


@pytest.mark.parametrize(
    ("values", "stopped"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], None),
        ([1.0, 2.0, 3.0, 0.0, 0.0], 3),
        ([3.0, 1.0, 2.0, 0.5, 0.7], None),
        ([3.0, 1.0, 1.0, 1.0, 0.0], 4),
        ([1.0, 1.0, 1.0], 3),
    ],
)
def test_two_epochs_without_a_better_one_end_it(values, stopped):
    callback, ended = epochs_of(values, 9)
    assert ended == stopped
    assert len(callback.seen) == len(callback.history) == (stopped or len(values))
    assert set(callback.state) == {"w"}


def test_the_last_epoch_is_no_early_end():
    callback, ended = epochs_of([1.0, 2.0, 3.0], 3)
    assert ended is None
    assert [item.epoch for item in callback.seen] == [1, 2, 3]


def test_the_search_may_end_it_at_any_other_epoch():
    assert epochs_of([3.0, 2.0, 1.0], 3, lambda found: found.epoch < 2)[1] == 2


def test_an_output_that_is_not_a_number_is_damage():
    model, sets = net(), Sets(image_set(9, 1), image_set(20, 2), image_set(20, 3))
    evaluator = CandidateEvaluator(model, sets, sets.read(model), lambda metrics: ConstraintResult([]))
    nan = {name: value * torch.nan for name, value in model.state_dict().items()}
    found = evaluator.measure(1, nan)
    assert (found.refused, found.causes) == (["an output is not a number"], [Cause.DAMAGED])
    assert evaluator.measure(1, model.state_dict()).causes == []


class Counting(Told):
    """A evaluator with a model, that counts what it measures."""

    def __init__(self, model):
        self.model, self.epochs = model, []

    def measure(self, epoch, state):
        self.epochs.append(epoch)
        return Measurement(epoch, state, {}, 1.0 + epoch, [], 1.0 + epoch)


@pytest.mark.parametrize(
    ("method", "measured"), [("finetune", [1, 2, 3]), ("sfr_on", [4]), ("boundary_expanding", [4])]
)
def test_where_epochs_are_no_answers_nothing_ends_a_trial_and_only_its_end_is_measured(method, measured):
    evaluator = Counting(net())
    callback = EpochCallback(evaluator, lambda found: True, 4)
    config = method_config(method, {"epochs": 4, "device": "cpu", "batch_size": 8})
    trial = run_trial(method, config, (image_set(9, 1), image_set(20, 2)), None, callback, METHODS[method].grows)
    assert evaluator.epochs == measured
    assert [item.epoch for item in trial.answers] == measured
    assert len(trial.history) == measured[-1]
    assert trial.state == ("stopped" if METHODS[method].grows else "finished")
