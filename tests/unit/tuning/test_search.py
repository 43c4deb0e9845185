"""A real search on the digits: it repeats, stays in its budget, ends bad trials, and refuses where a policy does."""

import math

import pytest
import torch

from salun_core.data import DataSpec, load_data
from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, UnlearnConfig, method_config, unlearn
from salun_core.methods.classification.training import train_classifier
from salun_core.methods.recipe import Recipe
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import saliency_scores
from salun_core.tuning import ConstraintResult, Problem, Sets, parse_budget, tune
from salun_core.tuning.search import _study
from salun_core.tuning.space import spaces_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    """A net that fits its digits, 40 of them to forget, and validation digits that it never saw."""
    data = load_data(DataSpec(source="digits", train_limit=400, validation_fraction=0.2))
    train = data.images("train")
    held_out = data.images("validation", train.normalisation)
    config = UnlearnConfig(epochs=6, learning_rate=0.1, schedule="cosine", batch_size=32, batch_norm="update")
    model, _ = train_classifier("resnet8", train, 10, config)
    forget, retain = train.select(range(40)), train.select(range(40, len(train)))
    scores = saliency_scores(model, forget.batches(64), torch.nn.functional.cross_entropy)
    return model, forget, retain, held_out, scores


def anything(metrics):
    return ConstraintResult([])


def problem(digits, method="salun", budget="15e", constraint=anything, seed=0, **overrides):
    model, forget, retain, held_out, scores = digits
    settings = {"epochs": 2, "batch_size": 64, "device": "cpu", "seed": seed, **overrides}
    return Problem(
        model=model,
        method=method,
        spaces=spaces_of(method, settings),
        images=(forget, retain),
        sets=Sets(forget, retain.select(range(100)), held_out),
        constraint=constraint,
        scores=scores if METHODS[method].needs_mask else None,
        budget=parse_budget(budget, len(forget) + len(retain)),
        seed=seed,
        spent=len(forget) if METHODS[method].needs_mask else 0,
    )


def without_clock(trials):
    return [record.model_dump(exclude={"seconds"}) for record in trials]


@pytest.fixture(scope="module")
def searched(digits):
    torch.set_num_threads(1)
    before = model_digest(digits[0])
    tuned = tune(problem(digits))
    assert model_digest(digits[0]) == before
    return tuned


def test_no_trial_is_pruned_after_its_first_epoch(digits):
    study = _study(problem(digits).spaces[0], 0)
    for _ in range(3):
        good = study.ask()
        good.report(1.0, 1)
        good.report(1.0, 2)
        study.tell(good, 1.0)
    bad = study.ask()
    bad.report(9.0, 1)
    assert not bad.should_prune()
    bad.report(9.0, 2)
    assert bad.should_prune()


def test_a_search_repeats_to_the_bit(digits, searched):
    again = tune(problem(digits))
    assert without_clock(again.trials) == without_clock(searched.trials)
    assert model_digest(again.chosen.result.model) == model_digest(searched.chosen.result.model)
    assert again.chosen.mask == searched.chosen.mask


def test_the_model_is_what_unlearning_with_the_chosen_settings_gives(digits, searched):
    model, forget, retain, *_ = digits
    chosen = searched.chosen
    plain = unlearn(model, "salun", forget=forget, retain=retain, config=chosen.result.config, mask=chosen.mask)
    assert model_digest(plain.model) == model_digest(chosen.result.model)
    assert [record.losses for record in plain.history] == [record.losses for record in chosen.result.history]
    assert chosen.result.changed_fraction == pytest.approx(plain.changed_fraction)
    assert chosen.mask.density == pytest.approx(searched.trials[chosen.number].density, abs=1e-4)


def test_it_starts_with_the_defaults_alone_and_keeps_the_best(digits, searched):
    assert len(searched.trials) >= 5
    points = [(trial.settings["learning_rate"], trial.density) for trial in searched.trials]
    assert points[0] == (method_config("salun", {}).learning_rate, Recipe().density)
    assert points.count(points[0]) == 1
    assert len({density for _, density in points}) >= 3
    assert searched.trials[searched.chosen.number].distance == min(trial.distance for trial in searched.trials)


def test_passes_are_counted_and_stay_in_the_budget(digits, searched):
    _, forget, retain, held_out, _ = digits
    reading = math.ceil((len(forget) + 100 + len(held_out)) / 3)
    epoch = len(forget) + len(retain)
    assert [trial.passes for trial in searched.trials] == [
        trial.epochs_run * (epoch + reading) for trial in searched.trials
    ]
    assert searched.passes == len(forget) + reading + sum(trial.passes for trial in searched.trials)
    assert searched.passes <= 15 * epoch
    assert searched.chosen.result.passes == searched.passes


def test_another_seed_tries_other_settings(digits, searched):
    other = tune(problem(digits, budget="6e", seed=1))
    first, second = (found.trials[1].settings["learning_rate"] for found in (searched, other))
    assert first != second


def test_the_policy_decides_and_none_may_be_allowed(digits):
    def sparse_only(metrics):
        return ConstraintResult([] if metrics["RA"].after > 2 else ["RA > 2"], 0.5)

    tuned = tune(problem(digits, budget="3e", constraint=sparse_only))
    assert tuned.chosen is None
    assert tuned.broken == "RA > 2"
    assert all(trial.refused == ["RA > 2"] for trial in tuned.trials)


def test_a_worse_model_that_is_allowed_beats_a_better_one_that_is_not(digits, searched):
    best = searched.trials[searched.chosen.number].figures

    def not_that(metrics):
        same = all(metrics[name].after == value for name, value in best.items() if name in metrics)
        return ConstraintResult(["taken"] if same else [], 0.1)

    tuned = tune(problem(digits, budget="8e", constraint=not_that))
    chosen = tuned.trials[tuned.chosen.number]
    assert chosen.refused == []
    assert chosen.figures != best


def test_a_rate_that_breaks_the_net_fails_its_trial_alone(digits):
    tuned = tune(problem(digits, budget="4e", learning_rate=1e5, momentum=0.0))
    assert {trial.state for trial in tuned.trials} <= {"failed", "finished", "stopped"}
    assert "failed" in {trial.state for trial in tuned.trials}
    failed = next(trial for trial in tuned.trials if trial.state == "failed")
    assert failed.passes > 0


def test_a_budget_too_small_is_refused(digits):
    with pytest.raises(UsageError, match="is too small: it is 300 passes, and the first trial needs"):
        tune(problem(digits, budget="300"))


@pytest.mark.parametrize("method", ["salun_soft", "influence", "boundary_expanding"])
def test_methods_whose_last_model_alone_is_an_answer(digits, method):
    overrides = {"influence_samples": 20} if method == "influence" else {}
    settings = {"epochs": 1} if method == "influence" else {}
    tuned = tune(problem(digits, method, budget="5e", **settings, **overrides))
    model, forget, retain, *_ = digits
    chosen = tuned.chosen.result
    plain = unlearn(model, method, forget=forget, retain=retain, config=chosen.config)
    assert model_digest(plain.model) == model_digest(chosen.model)
    assert tuned.passes <= 5 * (len(forget) + len(retain))
