"""The shipped suites are valid, a broken one lists all its faults, and no table lacks its controls."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from lab.bench.plan import SuiteRun
from lab.bench.suite import find_suite, load_suite, slug
from salun_core import plugins
from salun_core.errors import UsageError
from tests.lab.bench.conftest import SUITE
from tests.support.plugins import example

__all__ = ["example"]

SHIPPED = sorted((Path(__file__).parents[3] / "lab" / "suites").glob("*.yaml"))
GENERATIVE = ["ddpm-class", "sd-class", "sd-concept"]


def load(tmp_path, data):
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps(data))
    return load_suite(path)


def faults(tmp_path, data):
    with pytest.raises(UsageError, match="is not a valid suite") as caught:
        load(tmp_path, data)
    return caught.value.why


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_suite_is_valid_and_named_like_its_file(path):
    suite = load_suite(path)
    assert suite.name == path.stem
    assert "cpu" in suite.sizes
    for size in suite.sizes:
        plan = SuiteRun(suite, size, path.parent)
        assert all(plan.cost(cell) for cell in plan.cells)
        assert len({cell.plan for cell in plan.cells}) == len(plan.cells)


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_diffusion_suites_have_both_sizes_and_the_other_methods(name):
    suite = load_suite(next(path for path in SHIPPED if path.stem == name))
    assert set(suite.sizes) == {"cpu", "paper"}
    for size in suite.sizes:
        methods = {row.method for row in suite.size(size).methods}
        assert {"salun", "random_label", "gradient_ascent", "finetune", "esd"} <= methods
        assert ("uce" in methods) == ("forget_me_not" in methods) == (suite.kind == "text-to-image")


def test_a_broken_suite_lists_all_faults(tmp_path):
    data = copy.deepcopy(SUITE)
    data["titel"] = data.pop("title")
    data["methods"][0]["density"] = 1.5
    data["methods"][2]["method"] = "random_labels"
    data["sizes"]["cpu"]["model"]["training"] = {"epoch": 1}
    data["sizes"]["cpu"]["seeds"] = [0, 0]
    data["sizes"]["cpu"]["retrain"] = None
    data["sizes"]["cpu"]["forget"] = {"kind": "concept", "prompts": ["a"], "anchor_prompt": "b"}
    why = faults(tmp_path, data)
    for fault in (
        "titel: unknown key, did you mean 'title'?",
        "methods.0.density",
        "did you mean 'random_label'?",
        "epoch: unknown key, did you mean 'epochs'?",
        "sizes.cpu.seeds: a seed occurs twice",
        "sizes.cpu.references: there are none without `retrain`",
        "a classification model forgets random or class or subject or sequence, not concept",
    ):
        assert fault in why


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"name": "x", "method": "salun"}, "salun needs a mask"),
        ({"name": "x", "method": "finetune", "mask": "saliency", "density": 0.5}, "finetune takes no mask"),
        ({"name": "x", "method": "finetune", "density": 0.5}, "only a mask has one"),
        ({"name": "x", "method": "retrain"}, "retrain is the reference"),
        ({"name": "x", "method": "auto"}, "the method auto needs a search"),
        ({"name": "x", "method": "auto", "mask": "random"}, "leave out mask and density"),
        ({"name": "x", "method": "finetune", "config": {"seed": 1}}, "config sets a seed"),
        ({"name": "x", "method": "finetune", "config": {"epochs": 0}}, "epochs"),
        ({"name": "rl!", "method": "finetune"}, "'rl' occurs twice"),
    ],
)
def test_a_row_that_cannot_be_measured_is_refused(tmp_path, row, fault):
    assert fault in faults(tmp_path, SUITE | {"methods": [*SUITE["methods"], row]})


@pytest.mark.parametrize(("left_out", "fault"), [(1, "'SalUn' has no control"), (2, "no control without a mask")])
def test_a_table_without_its_controls_is_refused(tmp_path, left_out, fault):
    rows = [row for number, row in enumerate(SUITE["methods"]) if number != left_out]
    assert fault in faults(tmp_path, SUITE | {"methods": rows})


def test_a_control_of_another_density_or_config_does_not_count(tmp_path):
    for change in ({"density": 0.4}, {"config": {"epochs": 2}}):
        rows = [row | (change if row["name"] == "SalUn, random mask" else {}) for row in SUITE["methods"]]
        assert "'SalUn' has no control" in faults(tmp_path, SUITE | {"methods": rows})


def test_a_row_may_leave_the_method_to_its_search(tmp_path):
    rows = [{"name": "x", "method": "auto"}, {"name": "y", "method": "salun,scrub", "budget": "10e"}]
    data = copy.deepcopy(SUITE) | {"methods": rows}
    data["sizes"]["cpu"]["search"] = {"budget": "20e"}
    plan = SuiteRun(load(tmp_path, data), "cpu")
    assert [plan.cost(cell) for cell in plan.cells if cell.seed == plan.seeds[0]] == [
        {"search": "20e"},
        {"search": "10e"},
    ]


def test_a_suite_is_found_by_name_with_the_nearest_match():
    folder = SHIPPED[0].parent
    assert find_suite("sd-class", (folder,)) == folder / "sd-class.yaml"
    with pytest.raises(UsageError, match="did you mean 'sd-class'"):
        find_suite("sd-clas", (folder,))


def test_cells_are_ordered_by_seed_and_can_be_selected(plan):
    whole = SuiteRun(plan.suite, "cpu")
    assert [cell.name for cell in whole.cells][:4] == ["salun-0", "salun-random-mask-0", "rl-0", "salun-1"]
    chosen = SuiteRun(plan.suite, "cpu", only=("SalUn, random mask",), seed_count=1)
    assert [cell.name for cell in chosen.cells] == ["salun-random-mask-0"]
    with pytest.raises(UsageError, match="unknown row"):
        _ = SuiteRun(plan.suite, "cpu", only=("Salu",)).cells
    with pytest.raises(UsageError, match="there are no 3 seeds"):
        _ = SuiteRun(plan.suite, "cpu", seed_count=3).cells


def test_slugs():
    assert [slug(name) for name in ("SalUn, random mask", "ESD-x", "α")] == ["salun-random-mask", "esd-x", "row"]


def rows_in_a_file(tmp_path, rows):
    data = copy.deepcopy(SUITE)
    (tmp_path / "rows.yaml").write_text(json.dumps({"methods": rows}))
    data["rows_from"] = "rows.yaml"
    return data


def test_suites_may_share_a_file_of_rows(tmp_path):
    data = rows_in_a_file(tmp_path, SUITE["methods"])
    del data["methods"]
    assert load(tmp_path, data).methods == load(tmp_path, SUITE).methods


def test_faults_of_shared_rows_are_listed_too(tmp_path):
    data = rows_in_a_file(tmp_path, [{"name": "x", "method": "saluns"}])
    assert "rows_from: the suite has its own `methods`" in faults(tmp_path, data)
    del data["methods"]
    assert "did you mean 'salun'?" in faults(tmp_path, data)
    assert "rows_from" in faults(tmp_path, {**data, "rows_from": "none.yaml"})


def test_a_row_with_its_own_budget_is_searched_but_needs_no_control(tmp_path):
    data = copy.deepcopy(SUITE)
    cheap = {"name": "cheap", "method": "salun", "mask": "saliency", "budget": "2e"}
    data["methods"].append(cheap)
    assert "a budget without a search" in faults(tmp_path, data)
    data["sizes"]["cpu"]["search"] = {"budget": "8e"}
    suite = load(tmp_path, data)
    plan = SuiteRun(suite, "cpu", tmp_path)
    assert {plan.search(row).budget for row in suite.methods if row.search and row.name != "cheap"} == {"8e"}
    assert plan.search(suite.methods[-1]).budget == "2e"
    data["methods"][-1] = {**cheap, "budget": "2m"}
    assert "is not reproducible" in faults(tmp_path, data)


def test_a_row_may_have_the_method_of_a_plug_in_and_its_cells_its_digest(example, tmp_path):
    row = {"name": "Uniform", "method": "uniform", "density": 0.3, "config": {"epochs": 1}}
    rows = [{**row, "mask": "saliency"}, {**row, "mask": "random", "name": "Uniform, random"}, *SUITE["methods"][2:]]
    (tmp_path / "own.yaml").write_text(json.dumps({**SUITE, "methods": rows}))
    plan = SuiteRun(load_suite(tmp_path / "own.yaml"), "cpu", tmp_path)
    first = plan.cells[0]
    assert (first.name, plan.cost(first)) == ("uniform-0", {"epochs": 1})
    (example / "salun_example.py").write_text((example / "salun_example.py").read_text() + "\n")
    plugins._loaded.clear()
    again = SuiteRun(load_suite(tmp_path / "own.yaml"), "cpu", tmp_path)
    assert again.cells[0].plan != first.plan
    assert again.cells[2].plan == plan.cells[2].plan
