"""A suite whose settings are searched: the same budget for all rows, the same figures each time, all cost counted."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from lab.bench.cell import kept_cell
from lab.bench.page import choices, section, table
from lab.bench.plan import SuiteRun
from lab.bench.plot import plot
from lab.bench.results import collect
from lab.bench.runner import run_suite
from lab.bench.suite import load_suite
from salun_core.config import load
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks.task import TuningOptions
from salun_core.tuning import TuningLog

pytestmark = pytest.mark.slow

ROWS = [
    {"name": "SalUn", "method": "salun", "mask": "saliency", "config": {"epochs": 2}},
    {"name": "SalUn, random mask", "method": "salun", "mask": "random", "config": {"epochs": 2}},
    {"name": "RL", "method": "random_label", "config": {"epochs": 2}},
    {
        "name": "SalUn as written",
        "method": "salun",
        "mask": "saliency",
        "density": 0.5,
        "config": {"epochs": 1},
        "search": False,
    },
]
SUITE = {
    "format": "salun.suite/v1",
    "name": "searched",
    "title": "Digits: searched",
    "kind": "classification",
    "methods": ROWS,
    "sizes": {
        "cpu": {
            "data": {"source": "digits", "train_limit": 200, "test_limit": 60},
            "model": {"architecture": "resnet8", "training": {"epochs": 2, "batch_size": 32}},
            "forget": {"kind": "random", "fraction": 0.1},
            "seeds": [3],
            "threads": 1,
            "search": {"budget": "5e"},
        }
    },
}


def quiet(_text: str) -> None:
    pass


def plan_of(folder: Path, data: dict, **extra) -> SuiteRun:
    path = folder / "searched.yaml"
    path.write_text(json.dumps(data))
    return SuiteRun(load_suite(path), "cpu", folder, **extra)


def changed(**size) -> dict:
    data = copy.deepcopy(SUITE)
    data["sizes"]["cpu"] |= size
    return data


def faults(folder: Path, data: dict) -> str:
    with pytest.raises(UsageError, match="is not a valid suite") as caught:
        plan_of(folder, data)
    return caught.value.why


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("suite"), SUITE)


@pytest.fixture(scope="module")
def out(plan, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("searched")
    assert not run_suite(plan, folder, quiet).failed
    return folder


@pytest.fixture(scope="module")
def resumed(plan, tmp_path_factory):
    """A second run from scratch, of a row with a search and of one without; killed after its first cell."""
    folder, two = tmp_path_factory.mktemp("again"), dataclasses.replace(plan, only=("SalUn", "SalUn as written"))

    def die(_name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(two, folder, quiet, on_cell=die)
    return two, folder, run_suite(two, folder, quiet)


def figures(plan, out, name):
    return next(row for row in collect(plan, out).rows if row.name == name).figures[0]


def log_of(out, cell):
    return load(TuningLog, out / "cells" / cell / "tuning.json")


def test_two_runs_from_scratch_differ_only_in_seconds(out, resumed):
    two, folder, _ = resumed

    def repeatable(folder):
        rows = json.loads(collect(two, folder).model_dump_json())["rows"]
        rows = [row for row in rows if row["name"] in ("original", *two.only)]
        for item in (item for row in rows for item in row["figures"]):
            item["seconds"] = item["search_seconds"] = None
            item["evidence"] = None  # its bytes hold seconds
        return rows

    def chosen(folder):
        return [
            line for line in choices(collect(two, folder)).splitlines() if line.startswith(("| SalUn |", "| SalUn as"))
        ]

    assert repeatable(out) == repeatable(folder)
    assert chosen(out) == chosen(folder)
    assert len(chosen(out)) == 2


def test_a_killed_run_keeps_its_searched_cells(resumed):
    assert resumed[2].kept == ["salun-3"]
    assert resumed[2].measured == ["salun-as-written-3"]


def test_a_cell_without_its_search_log_is_measured_again(plan, out, tmp_path):
    cell = plan.cells[0]
    assert kept_cell(out, cell) is not None
    copied = shutil.copytree(out, tmp_path / "copy")
    log = copied / "cells" / cell.name / "tuning.json"
    log.write_text(log.read_text().replace('"seed": 3', '"seed": 4'))
    assert kept_cell(copied, cell) is None
    log.unlink()
    assert kept_cell(copied, cell) is None
    assert not (out / "cells" / "salun-as-written-3" / "tuning.json").exists()


def context_of(out):
    return RunContext(out / "base-3", str(out / "forget-3.json"))


def test_the_log_of_an_unbounded_search_names_no_policy(out):
    log = log_of(out, "salun-3")
    assert (log.policy, log.policy_digest, log.budget) == ("none: the objective alone decides", "", "5e")
    assert not any(trial.refused for trial in log.trials)
    best = min(trial.distance for trial in log.trials if trial.distance is not None)
    assert log.trials[log.chosen].distance == best


def test_a_row_counts_its_whole_search_and_the_chosen_run(plan, out, tmp_path):
    item, log = figures(plan, out, "SalUn"), log_of(out, "salun-3")
    assert item.tried == len(log.trials)
    assert item.passes == item.search_passes == log.passes
    settings = {name: value for name, value in item.chosen.items() if name != "density"}
    settings["epochs"] = int(settings["epochs"])
    context, path = context_of(out), tmp_path / "mask.safetensors"
    recipe = Recipe(
        method="salun", density=item.chosen["density"], method_config={**ROWS[0]["config"], **settings}, seed=3
    )
    compute_mask(context, recipe, path)
    run_unlearning(context, recipe, path, tmp_path / "after")
    assert item.own_passes == load(RunFacts, tmp_path / "after" / "run.json").passes < item.passes
    evidence = load(Evidence, out / "cells" / "salun-3" / "evidence.json")
    assert load_model(tmp_path / "after").digest == evidence.measured.after  # the very model that the search chose


def test_a_row_outside_the_search_runs_as_written(plan, out):
    item = figures(plan, out, "SalUn as written")
    assert (item.chosen, item.tried, item.own_passes) == (None, None, None)
    config = load(Evidence, out / "cells" / "salun-as-written-3" / "evidence.json").run.config
    assert config["epochs"] == 1
    assert "search_passes" not in json.loads(item.model_dump_json())  # results without a search stay as they were


def test_the_random_control_is_searched_like_its_counterpart_without_scores(out, tmp_path):
    salient, control = log_of(out, "salun-3"), log_of(out, "salun-random-mask-3")
    evidence = load(Evidence, out / "cells" / "salun-random-mask-3" / "evidence.json")

    def before_the_trials(log):
        return log.passes - sum(trial.passes for trial in log.trials)

    assert control.budget == salient.budget
    first = [(log.trials[0].settings, log.trials[0].density) for log in (salient, control)]
    assert first[0] == first[1]
    assert before_the_trials(salient) - before_the_trials(control) == evidence.forgotten.count
    density, path = control.trials[control.chosen].density, tmp_path / "mask.safetensors"
    drawn = compute_mask(context_of(out), Recipe(density=density), path, random_seed=3)
    assert evidence.measured.mask == drawn.digest
    assert evidence.integrity.frozen_changed == 0


def test_the_control_at_a_density_equals_the_mask_of_the_mask_step(out, tmp_path):
    context = context_of(out)
    alone: list[int] = []
    for density, seed in ((0.05, 1), (0.3, 2)):
        options = TuningOptions("3e", bounded=False, density=density, random_mask_seed=seed, on_chosen=alone.append)
        after = tmp_path / f"after-{seed}"
        run_unlearning(context, Recipe(method="salun", method_config={"epochs": 1}), None, after, tuning=options)
        wanted = compute_mask(context, Recipe(density=density), tmp_path / "mask.safetensors", random_seed=seed)
        used = SaliencyMask.load(after / "mask.safetensors")
        assert used == wanted
        assert used.facts["scores"] == "random"
        assert {trial.density for trial in load(TuningLog, after / "tuning.json").trials} == {density}
    assert len(alone) == 2


def test_a_cell_depends_on_the_budget_of_its_search(plan, tmp_path):
    other = plan_of(tmp_path, changed(search={"budget": "6e"}))
    same = [before.plan == after.plan for before, after in zip(plan.cells, other.cells, strict=True)]
    assert same == [False, False, False, True]
    bounded = plan_of(tmp_path, changed(search={"budget": "5e", "policy": "classifier"}))
    assert [before.plan == after.plan for before, after in zip(plan.cells, bounded.cells, strict=True)] == same


def test_a_search_without_a_result_is_reported_and_the_others_are_measured(out, tmp_path):
    rule = {"metric": "RA", "op": ">=", "value": 2, "reason": "nothing can"}
    (tmp_path / "strict.json").write_text(json.dumps({"format": "salun.policy/v1", "name": "strict", "rules": [rule]}))
    data = changed(search={"budget": "2e", "policy": "strict.json"})
    plan = plan_of(tmp_path, data, only=("RL", "SalUn as written"))
    copied = shutil.copytree(out, tmp_path / "copy")
    outcome = run_suite(plan, copied, quiet)
    assert list(outcome.failed) == ["rl-3"]
    assert "no setting satisfies the policy strict" in outcome.failed["rl-3"]
    assert outcome.kept == ["salun-as-written-3"]


def test_the_tables_have_both_costs_and_the_chosen_settings(plan, out):
    results = collect(plan, out)
    head, _, *lines = table(results).splitlines()
    assert head.endswith("| passes | of which the chosen run |")
    item = figures(plan, out, "SalUn")
    assert next(line for line in lines if line.startswith("| SalUn |")).endswith(
        f"| {item.passes:,} | {item.own_passes:,} |"
    )
    settings = choices(results).splitlines()
    assert settings[0] == "| chosen settings | seed 3 | trials |"
    assert f"density {item.chosen['density']:g}, epochs {item.chosen['epochs']:g}" in settings[2]
    assert settings[-1] == "| SalUn as written (50%) | as written | – |"
    text = section(results)
    assert choices(results) in text
    assert "the same budget, 5e, on held-out data; no policy bounds it" in text
    picture = plot(results.model_copy(update={"kind": "text-to-image"}))  # without a reference there is no gap
    assert f"SalUn {100 - 100 * item.values['RA']:.2f} at {item.own_passes} passes" in picture


def test_a_dry_run_has_the_cost_of_a_search(plan, tmp_path):
    assert plan.cost(plan.cells[0]) == {"search": "5e", "epochs a trial at most": 2}
    assert plan.cost(plan.cells[3]) == {"epochs": 1}
    passes = plan_of(tmp_path, changed(search={"budget": "20000"}))
    assert passes.cost(passes.cells[0]) == {"passes": 20000, "epochs a trial at most": 2}


@pytest.mark.parametrize(
    ("search", "fault"),
    [
        ({"budget": "90s"}, "is not reproducible"),
        ({"budget": "2h"}, "is not reproducible"),
        ({"budget": "many"}, "is not a budget"),
        ({"budget": "0e"}, "is not a budget"),
        ({}, "sizes.cpu.search.budget"),
        ({"budget": "5e", "polici": "none"}, "sizes.cpu.search.polici: unknown key"),
    ],
)
def test_a_budget_that_is_not_reproducible_is_refused(tmp_path, search, fault):
    assert fault in faults(tmp_path, changed(search=search))


@pytest.mark.parametrize("left_out", [1, 2])
def test_a_searched_table_without_its_controls_is_refused(tmp_path, left_out):
    rows = [row for number, row in enumerate(ROWS) if number != left_out]
    assert "no control" in faults(tmp_path, SUITE | {"methods": rows})


@pytest.mark.parametrize("number", [1, 2])
def test_a_control_without_the_search_does_not_count(tmp_path, number):
    rows = [row | ({"search": False} if at == number else {}) for at, row in enumerate(ROWS)]
    rows[1] = rows[1] | ({"density": 0.5} if number == 1 else {})
    assert "no control" in faults(tmp_path, SUITE | {"methods": rows})


def test_a_control_of_a_fixed_density_does_not_count_for_a_searched_one(tmp_path):
    rows = [row | ({"density": 0.5} if at == 1 else {}) for at, row in enumerate(ROWS)]
    assert "'SalUn' has no control" in faults(tmp_path, SUITE | {"methods": rows})
    both = [row | ({"density": 0.5} if at < 2 else {}) for at, row in enumerate(ROWS)]
    assert plan_of(tmp_path, SUITE | {"methods": both}).cells


def test_only_a_searched_row_may_lack_a_density(tmp_path):
    wanted = "a mask without a density"
    assert wanted in faults(tmp_path, changed(search=None))
    rows = [*ROWS, ROWS[3] | {"name": "more", "density": None}]
    assert f"methods.4: {wanted}" in faults(tmp_path, SUITE | {"methods": rows})
    sizes = SUITE["sizes"] | {"paper": changed(search=None)["sizes"]["cpu"]}
    assert wanted in faults(tmp_path, SUITE | {"sizes": sizes})  # the rows serve both sizes


def test_a_search_needs_a_classifier_held_out_images_and_an_open_setting(tmp_path):
    data = changed(data={"source": "digits", "validation_fraction": 0.0})
    assert "no held-out images to search on" in faults(tmp_path, data)
    assert "only the settings of classifiers" in faults(tmp_path, SUITE | {"kind": "text-to-image"})
    fixed = {"name": "fixed", "method": "gradient_ascent"}
    fixed["config"] = {"learning_rate": 0.01, "epochs": 1, "batch_norm": "update"}
    assert "there is nothing to search for" in faults(tmp_path, SUITE | {"methods": [*ROWS, fixed]})


def test_what_a_row_sets_is_fixed(out, tmp_path):
    rows = [ROWS[2] | {"config": {"epochs": 1, "learning_rate": 0.02}}]
    plan = plan_of(tmp_path, changed(search={"budget": "3e"}) | {"methods": [*rows, *ROWS[:2]]}, only=("RL",))
    copied = shutil.copytree(out, tmp_path / "copy")
    assert run_suite(plan, copied, quiet).measured == ["rl-3"]
    log = log_of(copied, "rl-3")
    assert all("learning_rate" not in trial.settings and trial.epochs_run <= 1 for trial in log.trials)
    config = load(Evidence, copied / "cells" / "rl-3" / "evidence.json").run.config
    assert (config["learning_rate"], config["epochs"]) == (0.02, 1)


def test_only_a_suite_can_leave_the_policy_out(out, tmp_path):
    options, recipe = TuningOptions("3e", "none"), Recipe(method="salun", method_config={"epochs": 1})
    assert options.bounded
    with pytest.raises(UsageError, match="unknown policy"):
        run_unlearning(context_of(out), recipe, None, tmp_path / "after", tuning=options)
