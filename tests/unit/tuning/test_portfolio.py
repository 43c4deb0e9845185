"""A search over methods: who is tried, what is dropped, and that a trial which goes on is the trial without a break."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, method_config, unlearn
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.tuning import ConstraintResult, Problem, Sets, parse_budget, tune
from salun_core.tuning.search import _FIRST, _WARMUP, SearchState
from salun_core.tuning.space import PORTFOLIO, methods_of, spaces_of
from salun_core.tuning.trial import EpochCallback, Measurement, run_trial
from tests.support.by_hand import image_set, net

SETTINGS = {"batch_size": 16, "device": "cpu", "epochs": 4, "seed": 0}
FORGET, RETAIN, HELD_OUT = image_set(16, 1), image_set(48, 2), image_set(24, 3)
READING = math.ceil((len(FORGET) + len(RETAIN) + len(HELD_OUT)) / 3)


def anything(metrics):
    return ConstraintResult([])


def problem(method="salun,random_label,scrub", budget="32e", **overrides):
    model, spaces = net(), spaces_of(method, SETTINGS | overrides)
    masked = any(space.densities for space in spaces)
    return Problem(
        model=model,
        method=method,
        spaces=spaces,
        images=(FORGET, RETAIN),
        sets=Sets(FORGET, RETAIN, HELD_OUT),
        constraint=anything,
        scores=saliency_scores(model, FORGET.batches(8), cross_entropy) if masked else None,
        budget=parse_budget(budget, len(FORGET) + len(RETAIN)),
        seed=0,
        spent=len(FORGET) if masked else 0,
    )


@pytest.fixture(scope="module")
def searched():
    torch.set_num_threads(1)
    told = []
    return tune(problem(), lambda record: told.append((record.number, record.method, record.epochs_run))), told


class Falling:
    """An evaluator that finds each epoch better than the one before."""

    def __init__(self):
        self.model = net()

    def measure(self, epoch, state):
        return Measurement(epoch, state, {}, -epoch, [], -epoch)


@pytest.mark.parametrize("method", sorted(name for name, row in METHODS.items() if row.grows))
def test_a_trial_that_goes_on_has_the_bits_of_one_without_a_break(method):
    shapes = {name: tuple(p.shape) for name, p in net().named_parameters()}
    mask = SaliencyMask.random(shapes, 0.4, 0) if METHODS[method].needs_mask else None
    config = method_config(method, SETTINGS | {"epochs": 3, "batch_norm": "update", "learning_rate": 0.01})
    broken, whole = (EpochCallback(Falling(), lambda seen: True, 3) for _ in range(2))
    for limit in (1, 3):
        broken.go_on = lambda seen, limit=limit: seen.epoch < limit
        last = run_trial(method, config, (FORGET, RETAIN), mask, broken, growing=True)
        assert len(last.history) == limit
    run_trial(method, config, (FORGET, RETAIN), mask, whole, growing=True)
    assert [item.epoch for item in broken.seen] == [item.epoch for item in whole.seen] == [1, 2, 3]
    for one, other in zip(broken.seen, whole.seen, strict=True):
        assert all(torch.equal(one.state[name], other.state[name]) for name in whole.state)
    assert [record.losses for record in broken.history] == [record.losses for record in whole.history]


def test_each_method_begins_with_its_defaults_for_the_promised_epochs(searched):
    tuned, told = searched
    assert _FIRST >= _WARMUP
    assert told[:3] == [(0, "salun", _FIRST), (1, "random_label", _FIRST), (2, "scrub", _FIRST)]
    for trial in tuned.trials[:3]:
        assert trial.settings["learning_rate"] == method_config(trial.method).learning_rate
    assert tuned.trials[0].density == 0.5
    assert tuned.not_tried == []


def test_the_better_half_goes_on_and_one_is_left(searched):
    tuned, _ = searched
    of = {
        name: [trial for trial in tuned.trials if trial.method == name]
        for name in methods_of("salun,random_label,scrub")
    }
    dropped_first = max(of, key=lambda name: of[name][0].distance if len(of[name]) == 1 else -1)
    assert len(of[dropped_first]) == 1
    assert of[dropped_first][0].epochs_run == _FIRST
    kept = [name for name in of if name != dropped_first]
    assert all(of[name][0].epochs_run > _FIRST or len(of[name]) > 1 for name in kept)
    assert len(tuned.trials) > 3
    assert tuned.trials[-1].method == tuned.trials[-2].method


def test_passes_are_counted_once_and_stay_in_the_budget(searched):
    tuned, _ = searched
    whole = len(FORGET) + len(RETAIN)
    of_epoch = {"salun": whole, "random_label": whole}
    for trial in tuned.trials:
        if trial.method in of_epoch:
            assert trial.passes == trial.epochs_run * (of_epoch[trial.method] + READING)
    assert tuned.passes == len(FORGET) + READING + sum(trial.passes for trial in tuned.trials)
    assert tuned.passes <= 32 * whole


def test_the_model_is_that_of_the_chosen_method_with_its_settings(searched):
    chosen, trials = searched[0].chosen, searched[0].trials
    assert chosen.result.method == trials[chosen.number].method
    assert trials[chosen.number].distance == min(trial.distance for trial in trials)
    assert (chosen.mask is None) == (trials[chosen.number].density is None)
    again = unlearn(
        net(), chosen.result.method, forget=FORGET, retain=RETAIN, config=chosen.result.config, mask=chosen.mask
    )
    assert model_digest(again.model) == model_digest(chosen.result.model)


def test_a_search_over_methods_repeats_to_the_bit():
    one, other = (tune(problem("random_label,finetune", budget="14e")) for _ in range(2))
    assert len({trial.method for trial in one.trials}) == 2
    assert [trial.model_dump(exclude={"seconds"}) for trial in other.trials] == [
        trial.model_dump(exclude={"seconds"}) for trial in one.trials
    ]
    assert model_digest(other.chosen.result.model) == model_digest(one.chosen.result.model)


def test_a_tiny_budget_gives_the_first_method_as_it_is_and_lists_the_others():
    alone, among = (tune(problem(method, budget="7e")) for method in ("salun", "salun,random_label,scrub"))
    assert among.not_tried == ["random_label", "scrub"]
    assert among.trials[0].epochs_run == alone.trials[0].epochs_run
    assert among.chosen.result.method == "salun"
    assert {trial.method for trial in among.trials} == {"salun"}
    with pytest.raises(UsageError, match="is too small: it is 10 passes, and the first trial needs"):
        tune(problem(budget="10"))


def test_auto_is_the_portfolio_and_a_list_narrows_it():
    assert methods_of("auto") == PORTFOLIO
    assert [space.method for space in spaces_of("scrub, salun", {})] == ["scrub", "salun"]
    with pytest.raises(UsageError, match="names a method twice"):
        spaces_of("scrub,scrub", {})
    with pytest.raises(UsageError, match="did you mean 'scrub'"):
        spaces_of("salun,scrubb", {})
    with pytest.raises(UsageError, match="retain_weight: unknown key"):
        spaces_of("neggrad_plus,salun", {"retain_weight": 0.9})


@pytest.mark.parametrize(
    ("values", "hopeless"),
    [
        ([9.0], False),  # before the promised epoch
        ([9.0, 9.5], True),
        ([9.0, 8.5], True),  # two more epochs at this pace give 7.5
        ([9.0, 5.0], False),  # they may give less than the best
        ([9.0, 1.0], False),  # the best so far
        ([1.0, 1.5], True),
    ],
)
def test_among_methods_a_trial_ends_that_cannot_reach_the_best_at_its_pace(values, hopeless):
    state = SearchState(None, None, 0, compares=True, least=1.0)
    callback = EpochCallback(None, None, 4, seen=[Measurement(1, {}, {}, value, [], value) for value in values])
    assert state.hopeless(callback) == hopeless
    assert not SearchState(None, None, 0, least=1.0).hopeless(callback)
