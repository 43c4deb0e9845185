"""Several requests in sequence: each from the result of the last one, evaluated together, with the debt."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lab.bench.cell import merged_facts
from lab.bench.page import choices, table
from lab.bench.results import collect
from lab.bench.runner import run_suite
from lab.bench.suite import load_suite
from salun_core.config import load
from salun_core.data.split import read_split
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import EpochRecord, RunFacts
from salun_core.methods.recipe import Recipe
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks import open_inputs
from salun_core.tuning import TuningLog
from tests.lab.bench.test_searched import ROWS, SUITE, plan_of

pytestmark = pytest.mark.slow

STEPS = [
    {"kind": "random", "fraction": 0.05},
    {"kind": "class", "class_id": "3"},
    {"kind": "random", "fraction": 0.05},
]
AS_WRITTEN = {"density": 0.5, "config": {"epochs": 1, "learning_rate": 0.05}}
SEQUENCE = copy.deepcopy(SUITE)
SEQUENCE["sizes"]["cpu"] |= {
    "forget": {"kind": "sequence", "steps": STEPS},
    "search": {"budget": "2e"},
    "retrain": {},
    "references": 1,
}
SEQUENCE["methods"] = [*ROWS[:3], ROWS[3] | AS_WRITTEN, ROWS[3] | AS_WRITTEN | {"mask": "random", "name": "random"}]
ONLY = ("SalUn", "SalUn as written", "random")


def quiet(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_of(tmp_path_factory.mktemp("suite"), SEQUENCE, only=ONLY)


@pytest.fixture(scope="module")
def out(plan, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sequence")
    assert not run_suite(plan, folder, quiet).failed
    return folder


def evidence_of(out, cell):
    return load(Evidence, out / "cells" / cell / "evidence.json")


def test_each_random_share_is_drawn_from_the_remaining_split(out):
    split = read_split(out / "base-3")
    gone: set[str] = set()
    for number in (1, 2, 3):
        path = out / f"forget-3-{number}.json"
        own = set(open_inputs(out / "base-3", str(path)).forget_set.samples)
        if number != 2:
            assert len(own) == round(0.05 * (len(split.train) - len(gone)))
            assert not own & gone
        gone |= own
    assert set(open_inputs(out / "base-3", str(out / "forget-3.json")).forget_set.samples) == gone
    assert read_split(out / "reference-3").digest == split.without(gone).digest


def test_a_cell_equals_its_requests_in_sequence(plan, out, tmp_path):
    model, passes = out / "base-3", 0
    for number in (1, 2, 3):
        mask, after = tmp_path / f"{number}.mask", tmp_path / str(number)
        context = RunContext(model, str(out / f"forget-3-{number}.json"))
        recipe = Recipe(method="salun", method_config=AS_WRITTEN["config"], seed=3)
        compute_mask(context, recipe, mask)
        run_unlearning(context, recipe, mask, after)
        model, passes = after, passes + load(RunFacts, after / "run.json").passes
    evidence = evidence_of(out, "salun-as-written-3")
    paths = model, tmp_path / "evidence.json", tmp_path / "report.html"
    again = evaluate(RunContext(out / "base-3", str(out / "forget-3.json")), *paths, reference=out / "reference-3")
    assert evidence.measured.after == again.measured.after
    assert evidence.metrics == again.metrics
    assert evidence.run.passes == passes
    assert [record.epoch for record in evidence.run.history] == [1, 2, 3]


def test_debt_and_runs_are_counted_and_passes_are_sums(plan, out):
    rows = {row.name: row.figures[0] for row in collect(plan, out).rows}
    for name in ONLY:
        forgotten = evidence_of(out, f"{'salun' if name == 'SalUn' else name.lower().replace(' ', '-')}-3").forgotten
        assert rows[name].runs == 3
        assert rows[name].debt == forgotten.count / forgotten.train_count
    assert rows["Retrain"].runs is None
    logs = [load(TuningLog, out / "cells" / "salun-3" / f"tuning-{number}.json") for number in (1, 2, 3)]
    assert rows["SalUn"].passes == sum(log.passes for log in logs)
    assert rows["SalUn"].tried == sum(len(log.trials) for log in logs)
    assert len(rows["SalUn"].chosen["density"]) == 3


def test_the_table_of_a_sequence_shows_runs_and_debt(plan, out):
    results = collect(plan, out)
    head, _, *lines = table(results).splitlines()
    assert head.endswith("| passes | of which the chosen run | runs | debt |")
    debt = next(row for row in results.rows if row.name == "SalUn").figures[0].debt
    assert next(line for line in lines if line.startswith("| SalUn |")).endswith(f"| 3 | {100 * debt:.2f} % |")
    assert next(line for line in lines if line.startswith("| Retrain |")).endswith("| – | – | – |")
    assert "SalUn as written (50%) | as written" in choices(results)


def test_a_model_that_missed_a_request_is_refused(out, tmp_path):
    after = tmp_path / "after"
    recipe = Recipe(method="finetune", method_config={"epochs": 1})
    run_unlearning(RunContext(out / "base-3", str(out / "forget-3-1.json")), recipe, None, after)
    context = RunContext(out / "base-3", str(out / "forget-3.json"))
    with pytest.raises(ModelError, match="different splits"):
        evaluate(context, after, tmp_path / "e.json", tmp_path / "r.html")


def test_a_cell_depends_on_its_requests_and_their_order(plan, tmp_path):
    data = copy.deepcopy(SEQUENCE)
    data["sizes"]["cpu"]["forget"]["steps"] = [STEPS[1], STEPS[0], STEPS[2]]
    assert {cell.plan for cell in plan.cells}.isdisjoint({cell.plan for cell in plan_of(tmp_path, data).cells})


def test_the_facts_of_several_runs_are_merged_without_a_mask():
    first = RunFacts(
        method="salun",
        seed=1,
        density=0.5,
        seconds={"mask": 1.0, "unlearn": 2.0},
        passes=10,
        history=[EpochRecord(epoch=1, learning_rate=0.1, losses={"forget": 1.0}, seconds=1.0)],
    )
    both = merged_facts([first, first.model_copy(update={"passes": 7})])
    assert (both.passes, both.seconds, both.density) == (17, {"mask": 2.0, "unlearn": 4.0}, None)
    assert [record.epoch for record in both.history] == [1, 2]


@pytest.mark.parametrize(
    ("steps", "kind", "fault"),
    [
        ([STEPS[0]], "classification", "sizes.cpu.forget"),
        ([STEPS[1], STEPS[0], STEPS[1]], "classification", "occurs twice: nothing of it is left"),
        ([STEPS[0], {"kind": "concept"}], "classification", "sizes.cpu.forget"),
        ([STEPS[0], STEPS[1]], "text-to-image", "a text-to-image model forgets class or concept, not sequence"),
    ],
)
def test_a_sequence_that_cannot_be_forgotten_is_refused(tmp_path, steps, kind, fault):
    data = copy.deepcopy(SEQUENCE) | {"kind": kind}
    data["sizes"]["cpu"]["forget"]["steps"] = steps
    (tmp_path / "suite.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="is not a valid suite") as caught:
        load_suite(tmp_path / "suite.json")
    assert fault in caught.value.why
