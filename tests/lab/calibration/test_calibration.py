"""`salun calibrate`: one small cell, the counts, and the page."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest

from lab import calibration
from lab.calibration import Cell, Judged
from lab.calibration.table import (
    BEGIN,
    END,
    Calibration,
    calibrate,
    markdown,
    merged,
    missed_goals,
    read_calibration,
    write_page,
    written,
)
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import Evidence, Forgotten, Integrity, Measured, Metric
from salun_core.gate import decide, load_policy
from tests.support.commands import _settings_restored, invoke  # noqa: F401 - a fixture, used by every test

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The command itself, with its JSON and its page."""
    folder = tmp_path_factory.mktemp("calibration")
    page = folder / "page.md"
    page.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    written_to = ("--results", folder / "counts.json", "--into", page)
    result = invoke("calibrate", "--models", "1", "--cells", "20 samples", *written_to, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), folder


def test_honest_models_pass_and_forgeries_are_refused(table):
    rows = {row["population"]: row for row in table[0]["rows"]}
    assert {row["cell"] for row in rows.values()} == {"20 samples"}
    assert rows["retrained"]["sort"] == "honest"
    assert (rows["retrained"]["models"], rows["retrained"]["refused"]) == (1, 0)
    forgeries = [row for row in rows.values() if row["sort"] == "forgery"]
    assert len(forgeries) > 5
    assert all(row["measured"] == 0 for row in rows.values())
    assert all(row["refused"] == 1 for row in forgeries if row["population"] not in UNTOLD), forgeries
    assert "change >=" in rows["one weight moved by one ulp"]["rules"]


UNTOLD = {"noise of 0.2", "last layer trained afresh", "a quarter mislabelled, the rest kept"}
"""What 20 samples cannot tell from a retrained model."""


def test_results_and_page_hold_what_was_printed(table):
    printed, folder = table
    assert json.loads((folder / "counts.json").read_text(encoding="utf-8")) == printed
    page = (folder / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Mine\n")
    assert page.endswith("\n\nafter\n")
    assert markdown(Calibration.model_validate(printed)) in page
    assert "\nold\n" not in page
    (folder / "page.md").write_text(f"{BEGIN}{END}", encoding="utf-8")
    arguments = ("--render-only", "--results", folder / "counts.json", "--into", folder / "page.md")
    result = invoke("calibrate", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "one weight moved by one ulp" in result.stdout
    assert markdown(Calibration.model_validate(printed)) in (folder / "page.md").read_text(encoding="utf-8")


def test_faults_are_reported(tmp_path):
    for words, said in (
        (("--cells", "20 sample"), "did you mean '20 samples'"),
        (("--render-only",), "add --results FILE"),
        (("--policy", "no-such", "--cells", "class"), "no-such"),
    ):
        result = invoke("calibrate", *words)
        assert result.exit_code == 2
        assert said in result.stderr
    with pytest.raises(UsageError, match="no place for the table"):
        write_page(tmp_path / "none.md", Calibration(policies={}, rows=[]))


def judged(population, sort, area, models):
    evidence = Evidence(
        created_at="",
        measured=Measured(before="a", after="b", dataset="", split="", forget_set=""),
        forgotten=Forgotten(count=9, train_count=99, kinds=["samples"]),
        integrity=Integrity(weights=9, weights_changed=9, non_finite=0, buffers_changed=0),
        metrics={"attack_auc": Metric(before=0.9, after=area, n=9, low=area - 0.01, high=area + 0.01)},
    )
    return [Judged(population, sort, evidence)] * models


def made_up(policy, models):
    yield from judged("right", "honest", 0.5, models)
    yield from judged("wrong", "forgery", 0.9, models)


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """Two cells that train nothing, and a policy with one rule."""
    known = {name: Cell(name, "samples", name, 3, partial(made_up, name)) for name in ("classifier", "ddpm")}
    monkeypatch.setattr("lab.calibration.table.all_cells", lambda: known)
    rule = {"metric": "attack_auc", "op": "inside", "value": 0.5, "tolerance": 0.1, "reason": "alike"}
    policy = tmp_path / "mine.yaml"
    policy.write_text(json.dumps({"name": "mine", "rules": [rule]}), encoding="utf-8")
    return policy


def test_a_policy_of_ones_own_is_counted(cells):
    found = calibrate(["classifier"], policy=cells)
    assert [(row.population, row.models, row.measured, row.refused) for row in found.rows] == [
        ("right", 3, 3, 0),
        ("wrong", 3, 0, 3),
    ]
    assert found.rows[1].rules == {"attack_auc inside": 3}
    assert found.rows[1].figures == {"attack_auc": (0.9, 0.9, 0.9)}
    assert list(found.policies) == ["mine"]
    assert "| classifier | wrong | forgery | 3 | 0 | 0 | 0 | 100% [44%, 100%] | attack_auc inside (3) |" in markdown(
        found
    )
    assert json.loads(written(found)) == found.model_dump(mode="json")


def test_the_page_says_what_is_told_and_which_goals_are_missed(cells):
    right, wrong = calibrate(["classifier"], policy=cells).rows
    few = right.model_copy(update={"cell": "5 samples", "samples": 5, "measured": 0, "procedure": 1, "refused": 2})
    passed = wrong.model_copy(update={"cell": "5 samples", "samples": 5, "procedure": 1, "refused": 2})
    page = markdown(Calibration(policies={"mine": "a" * 64}, rows=[right, wrong, few, passed]))
    assert "| model | classifier (9) | 5 samples |" in page
    assert "| right | 0% (measured 100%) | 67% (measured 0%) |" in page
    assert "| wrong | 100% | 67% |" in page
    assert "- 5 samples, right: 2 of 3 are refused" in page
    assert "- 5 samples, wrong: of 3 pass 1 as `procedure`, 0 as `measured`" in page
    assert missed_goals(right) == missed_goals(wrong) == []
    lenient = wrong.model_copy(update={"sort": "failed", "models": 20, "refused": 19, "procedure": 1})
    assert missed_goals(lenient) == []
    assert missed_goals(lenient.model_copy(update={"measured": 1, "procedure": 0})) != []
    assert missed_goals(lenient.model_copy(update={"sort": "own", "refused": 0, "procedure": 20})) == []


def test_a_cell_that_is_measured_again_replaces_its_own_rows_only(cells):
    first = calibrate(["classifier"], policy=cells)
    again = first.model_copy(update={"rows": [first.rows[0].model_copy(update={"models": 9})]})
    other = Calibration(
        policies={"theirs": "b" * 64}, rows=[first.rows[0].model_copy(update={"cell": "ddpm", "policy": "theirs"})]
    )
    both = merged(other, first)
    assert [row.cell for row in both.rows] == ["classifier", "classifier", "ddpm"]
    assert both.policies == {**other.policies, **first.policies}
    assert [(row.cell, row.models) for row in merged(both, again).rows] == [("classifier", 9), ("ddpm", 3)]
    edited = Calibration(policies={"theirs": "c" * 64}, rows=other.rows)
    assert merged(both, edited).policies["theirs"] == "c" * 64
    edited.rows[0] = edited.rows[0].model_copy(update={"cell": "another"})
    with pytest.raises(UsageError, match="another version of the policy theirs"):
        merged(both, edited)


def test_one_policy_for_several_kinds_of_model_is_refused(cells):
    with pytest.raises(UsageError, match="classifier, ddpm"):
        calibrate(policy=cells)


def test_all_cells_have_names_and_policies_that_ship():
    cells = calibration.all_cells()
    assert {"5 samples", "200 samples", "subject", "class", "diffusion class", "concept"} <= set(cells)
    assert all(cell.name == name and cell.models >= 10 for name, cell in cells.items())


def test_a_diffusion_model_whose_class_was_only_renamed_is_refused(monkeypatch):
    """Trained for a fraction of the steps: it draws digits well enough to be recognised."""
    from lab.calibration import diffusion

    monkeypatch.setattr(diffusion, "STEPS", 200)
    request = diffusion.Request(0, diffusion._classes())
    decisions = {}
    for name, forge in (("as it was", diffusion._nothing), ("renamed", diffusion._renamed)):
        after = request.before.of(copy.deepcopy(request.before.network))
        forge(request, after)
        evidence = request.evidence(after)
        decisions[name] = {rule.rule for rule in decide(evidence, load_policy("ddpm")).verdicts if not rule.passed}
    assert {"model changed", "UA >=", "restored <="} <= decisions["as it was"]
    assert "restored <=" in decisions["renamed"]
    assert not {"model changed", "UA >=", "RA >=", "FID <="} & decisions["renamed"]
    assert request.labels[request.forgotten[0]] == request.digit == 0


def test_prompts_of_a_digit_share_its_word():
    from lab.calibration import diffusion

    request = diffusion.Request(13, diffusion._texts())
    assert [request.table.names[row] for row in request.forgotten] == ["a three", "the digit three"]
    assert len(request.plan.label_of) == 20 * 25
    assert {*request.examples([3]).condition.tolist()} == {*request.forgotten}


def test_the_committed_page_and_counts_are_of_the_policies_that_ship():
    """An edited policy needs `make calibrate`; an edited table needs `salun calibrate --render-only`."""
    found = read_calibration(ROOT / "lab" / "results" / "calibration.json")
    assert found.policies == {name: load_policy(name).digest for name in found.policies}, "run `make calibrate`"
    of_policies = {name for name, cell in calibration.all_cells().items() if cell.policy in found.policies}
    assert "classifier" in found.policies
    assert {row.cell for row in found.rows} == of_policies
    assert f"\n{markdown(found)}\n" in (ROOT / "docs" / "research" / "calibration.md").read_text(encoding="utf-8")
