"""What may vary, and what the user has set and stays."""

import numpy as np
import pytest

from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, method_config, unlearn
from salun_core.methods.recipe import Recipe
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks import TASKS
from salun_core.tasks.task import named
from salun_core.tuning.search import _study
from salun_core.tuning.space import DENSITIES, Space
from salun_core.tuning.trial import EpochCallback
from tests.support.by_hand import image_set, net


class Fixed:
    """Answers as an optimiser that always takes the lowest value."""

    def suggest_float(self, name, low, high, log=False):
        return low

    def suggest_int(self, name, low, high):
        return low


def test_salun_varies_rate_order_batch_norm_and_density():
    space = Space.of("salun", {"seed": 3})
    assert set(space.ranges) == {"learning_rate"}
    assert set(space.choices) == {"order", "batch_norm"}
    assert (space.densities, space.growing, space.epochs) == (DENSITIES, True, 5)
    choice = space.draw(Fixed())
    assert choice.settings == {
        "learning_rate": pytest.approx(0.0003),
        "order": "sequential",
        "batch_norm": "freeze",
    }
    assert (choice.density, choice.epochs) == (0.02, 5)
    assert space.config(choice).seed == 3


def test_only_what_a_method_and_a_model_can_tell_apart_varies():
    assert set(Space.of("finetune", {}).choices) == {"batch_norm"}
    assert set(Space.of("salun", {}, normalised=False).choices) == {"order"}
    assert Space.of("influence", {}).choices == {}
    assert Space.of("salun", {"order": "mixed", "batch_norm": "update"}).choices == {}


def test_a_density_that_is_given_stays_and_a_method_without_a_mask_has_none():
    space = Space.of("salun", {}, density=0.15)
    assert "density" not in space.start()
    assert space.draw(Fixed()).density == 0.15
    assert Space.of("finetune", {}, density=0.15).draw(Fixed()).density is None


def test_the_one_start_is_the_method_as_it_is():
    config, space = method_config("salun"), Space.of("salun", {})
    start = space.start()
    assert start["learning_rate"] == config.learning_rate
    assert DENSITIES[start["density"]] == Recipe().density
    for name, values in space.choices.items():
        assert values[start[name]] == getattr(config, name)


def test_the_mirror_of_the_start_is_stronger_and_takes_the_other_choices():
    space = Space.of("salun", {})
    start, mirror = space.start(), space.mirror()
    low, high, _ = space.ranges["learning_rate"]
    assert start["learning_rate"] < mirror["learning_rate"] < high
    assert mirror["learning_rate"] / low == pytest.approx(high / start["learning_rate"])
    assert [mirror[name] for name in space.choices] == [1 - start[name] for name in space.choices]
    assert mirror["density"] == len(DENSITIES) - 1 - start["density"]
    assert Space.of("neggrad_plus", {}).mirror()["retain_weight"] == pytest.approx(0.8 + 0.999 - 0.95)


def test_a_method_that_chooses_its_own_strength_is_not_searched_and_the_default_of_a_search_is_another():
    task = TASKS["classification"]
    with pytest.raises(UsageError, match="salun_adaptive is not tuned"):
        Space.of("salun_adaptive", {})
    assert not task.check_tuning("salun_adaptive", {})
    assert [named(task, Recipe(), tune=tune).method for tune in (False, True)] == ["salun_adaptive", "salun"]


@pytest.mark.parametrize(("factor", "density"), [(5.5, 0.2), (12.0, 0.7), (0.4, 0.9)])
def test_a_search_leaves_its_start_for_the_optimum_in_six_trials(factor, density):
    """The budget of the study allows six. Rate and density alone decide, and the best pair is not the default."""
    space, ends = Space.of("salun", {}), []

    def far(choice):
        rates = np.log(choice.settings["learning_rate"] / (factor * 0.003)) / np.log(500)
        return abs(rates) + abs(np.log(choice.density / density) / np.log(45))

    for seed in (0, 1):
        study, tried = _study(space, seed), []
        for _ in range(6):
            suggestion = study.ask()
            tried.append(space.draw(suggestion))
            study.tell(suggestion, far(tried[-1]))
        given = [trial.number for trial in study.trials if "fixed_params" in trial.system_attrs]
        assert given == [0]
        assert study.best_trial.number not in given
        assert len({choice.settings["learning_rate"] for choice in tried}) == 6
        assert len({choice.density for choice in tried}) >= 3
        ends.append(study.best_value / far(tried[0]))
    assert np.mean(ends) < 0.5


def test_what_is_set_stays_and_bounds_the_epochs():
    space = Space.of("salun", {"learning_rate": 0.01, "epochs": 2})
    assert space.ranges == {}
    choice = space.draw(Fixed())
    assert "learning_rate" not in choice.settings
    assert (space.config(choice).learning_rate, space.config(choice).epochs) == (0.01, 2)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"retrain", "salun_adaptive"}))
def test_every_approximate_method_has_a_space_whose_points_are_valid(method):
    space = Space.of(method, {})
    assert space.ranges
    assert space.config(space.draw(Fixed())).epochs >= 1
    start = space.start()
    assert set(start) == {*space.ranges, *space.choices} | ({"density"} if space.densities else set()) | (
        set() if space.growing or space.epochs == 1 else {"epochs"}
    )
    for name, (low, high, _) in space.ranges.items():
        assert low <= start[name] <= high


def test_a_schedule_makes_the_number_of_epochs_a_choice():
    space = Space.of("salun", {"schedule": "cosine"})
    assert not space.growing
    assert space.draw(Fixed()).epochs == 1


def test_nothing_to_search_for_is_refused():
    with pytest.raises(UsageError, match="retrain is not tuned"):
        Space.of("retrain", {})
    with pytest.raises(UsageError, match="nothing to search for"):
        Space.of("finetune", {"learning_rate": 0.01, "epochs": 1, "batch_norm": "freeze"})
    fixed = {"learning_rate": 0.01, "epochs": 1, "batch_norm": "freeze", "order": "mixed"}
    with pytest.raises(UsageError, match="nothing to search for"):
        Space.of("salun", fixed, density=0.5)
    with pytest.raises(UsageError, match="learning_rat"):
        Space.of("salun", {"learning_rat": 0.01})


@pytest.mark.parametrize("method", sorted(name for name, row in METHODS.items() if row.grows))
def test_a_longer_run_begins_as_a_shorter_one(method):
    """The model after two of three epochs is, to the bit, what a run of two epochs makes."""
    model, forget, retain = net(), image_set(9, 1), image_set(20, 2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mask = SaliencyMask.random(shapes, 0.4, 0) if METHODS[method].needs_mask else None
    settings = {"batch_size": 8, "batch_norm": "update", "learning_rate": 0.01, "momentum": 0.9, "device": "cpu"}
    states = []

    class Kept(EpochCallback):
        def save(self, data):
            super().save(data)
            states.append(dict(self.state))

    config = {**settings, "epochs": 3}
    kept = Kept(None, None, 3)
    unlearn(model, method, forget=forget, retain=retain, config=config, mask=mask, checkpoint=kept)
    shorter = unlearn(model, method, forget=forget, retain=retain, config={**settings, "epochs": 2}, mask=mask)
    model.load_state_dict(states[1])
    assert model_digest(model) == model_digest(shorter.model)
