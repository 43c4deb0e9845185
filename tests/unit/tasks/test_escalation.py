"""No two recipes of a sweep are the same work, and stronger ones change more."""

from itertools import pairwise

import pytest
import torch

from salun_core.errors import UsageError
from salun_core.methods.diffusion import METHODS as DIFFUSION
from salun_core.methods.diffusion import unlearn_denoiser
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.method import DiffusionMethod
from salun_core.methods.diffusion.unified_concept_editing import UceConfig, projections
from salun_core.methods.method import resolve_config
from salun_core.methods.recipe import Recipe, Role
from salun_core.tasks import TASKS
from tests.support.tiny_diffusion import lab

METHODS = [(task, method) for task in ("classification", "diffusion") for method in TASKS[task].methods]


def work(task, recipe, searched=False):
    """Return what a recipe's result depends on: a closed form reads its own settings only, and a search all but them.

    Args:
        task: name of the task.
        recipe: one level.
        searched: whether settings that are not fixed are searched for, the density among them.
    """
    row, given = TASKS[task].methods[recipe.method], recipe.method_config
    resolved = resolve_config(TASKS[task].methods, recipe.method, given).model_dump()
    names = sorted(row.config_type.model_fields.keys() - row.base_config.model_fields.keys()) if row.edit else resolved
    if searched and TASKS[task].check_tuning(recipe.method, given):
        return recipe.method, {name: resolved[name] for name in names if name in given}
    return recipe.method, {name: resolved[name] for name in names}, recipe.density if row.needs_mask else None


def assert_all_differ(found):
    assert [one for number, one in enumerate(found) if one in found[:number]] == []


@pytest.mark.parametrize(("task", "method"), METHODS)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_no_two_levels_of_a_method_are_the_same_work(task, method, density):
    found = TASKS[task].escalation(Recipe(method=method, density=density))
    assert_all_differ([work(task, recipe) for recipe in found.all_recipes])
    if not TASKS[task].methods[method].fresh_start:
        assert {level.strength > 0 for level in found.levels if level.strength} == {True, False}
        assert {level.role for level in found.levels} > {Role.STRENGTH} or (task, method) == ("diffusion", "salun")


@pytest.mark.parametrize("method", TASKS["classification"].methods)
def test_no_two_levels_are_the_same_search(method):
    """A search tries all densities, so that a recipe with another one is the same search."""
    task = TASKS["classification"]
    found = task.escalation(Recipe(method=method), tune=True)
    assert_all_differ([work("classification", recipe, searched=True) for recipe in found.all_recipes])
    for recipe in found.all_recipes:  # a level that leaves nothing to search for would fail its run
        task.check_tuning(recipe.method, recipe.method_config)


@torch.no_grad()
@pytest.mark.parametrize("method", ["uce", "rece"])
def test_a_stronger_level_of_a_closed_form_changes_more(method):
    denoiser, sets = lab("text")
    prompts, before = sets.table.rows["encoder_hidden_states"][:, 1:], projections(denoiser)
    found = TASKS["diffusion"].escalation(Recipe(method=method))
    levels = sorted((level.strength, n) for n, level in enumerate(found.levels) if level.role is Role.STRENGTH)
    changes, remembered = [], []
    for _, number in levels:
        config = found.all_recipes[number].method_config
        after = projections(denoiser.of(unlearn_denoiser(denoiser, sets, method, config=config).model))
        changes.append(sum(float((after[name].weight - before[name].weight).norm()) for name in before))
        remembered.append(sum(float((after[name](prompts[0]) - before[name](prompts[1])).norm()) for name in before))
    assert [strength for strength, _ in levels] == [-2, -1, 0, 1, 2]
    assert all(less < more for less, more in pairwise(changes))
    if method == "uce":  # the distance from the anchor; RECE erases further embeddings, which moves the prompt on
        assert all(more > less for more, less in pairwise(remembered))


def test_a_closed_form_of_a_plug_in_has_no_strengths_unless_it_reads_a_known_one(monkeypatch):
    found = {}
    for name, kind in (("own:EDIT", DiffusionConfig), ("own:UCE", UceConfig)):
        row = DiffusionMethod(edit=lambda denoiser, sets, config: None, config_type=kind)
        monkeypatch.setitem(DIFFUSION, name, row)
        levels = TASKS["diffusion"].escalation(Recipe(method=name))
        assert [resolve_config(DIFFUSION, recipe.method, recipe.method_config) for recipe in levels.all_recipes]
        found[name] = [level.strength for level in levels.levels]
    assert found == {"own:EDIT": [0, 0], "own:UCE": [0, 1, 2, -1, -2, 0]}


def test_a_setting_of_the_closed_forms_is_refused_where_it_is_not_read():
    with pytest.raises(UsageError, match="edit_strength: unknown key"):
        resolve_config(DIFFUSION, "esd", {"edit_strength": 0.5})
