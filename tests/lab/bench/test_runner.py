"""A killed run goes on where it stopped; what is there is neither measured nor made again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil

import pytest

from lab.bench.page import table
from lab.bench.results import collect
from lab.bench.runner import SuiteOutcome, run_suite
from salun_core.digest import sha256_file
from salun_core.errors import ConflictError
from tests.lab.bench.conftest import files

pytestmark = pytest.mark.slow


def quiet(_text: str) -> None:
    pass


def test_the_first_cell_of_a_killed_run_is_kept_and_the_others_are_measured(plan, resumed):
    out, killed, outcome = resumed
    assert [name for name in killed if name.startswith("cells/")] == [
        f"cells/salun-0/{name}" for name in ("cell.json", "evidence.json", "report.html")
    ]
    assert outcome.kept == ["salun-0"]
    assert outcome.measured == ["rl-0", "salun-1", "rl-1"]
    now = files(out)
    assert {name: now[name] for name in killed} == killed  # base, reference, mask, cell: neither time nor byte
    assert not (out / "work").exists()


def test_a_complete_run_measures_nothing_and_yields_the_same_table(plan, resumed):
    out, _, _ = resumed
    before = table(collect(plan, out))
    outcome = run_suite(plan, out, quiet)
    assert outcome == SuiteOutcome(kept=[cell.name for cell in plan.cells])
    assert table(collect(plan, out)) == before


def test_a_cell_whose_evidence_changed_is_measured_again(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    note = json.loads((out / "cells/rl-1/cell.json").read_text())
    assert note["evidence"] == sha256_file(out / "cells/rl-1/evidence.json")
    (out / "cells/rl-1/evidence.json").write_text("{}")
    lost = dataclasses.replace(plan, only=("RL",))
    assert "rl-1" in collect(lost, out).missing
    assert run_suite(lost, out, quiet).measured == ["rl-1"]
    metrics = [json.loads((folder / "cells/rl-1/evidence.json").read_text())["metrics"] for folder in (out, resumed[0])]
    assert metrics[0] == metrics[1]  # the same seed, the same figures


def test_a_changed_row_is_the_only_one_measured_again(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    rows = [row.model_copy(update={"config": {"epochs": 2}}) if row.name == "RL" else row for row in plan.suite.methods]
    changed = dataclasses.replace(plan, suite=plan.suite.model_copy(update={"methods": rows}), seed_count=1)
    outcome = run_suite(changed, out, quiet)
    assert outcome.measured == ["rl-0"]
    assert outcome.kept == ["salun-0"]


def test_another_number_of_references_keeps_all_cells(plan, resumed):
    size = plan.suite.sizes["cpu"].model_copy(update={"references": 1})
    fewer = dataclasses.replace(plan, suite=plan.suite.model_copy(update={"sizes": {"cpu": size}}))
    assert run_suite(fewer, resumed[0], quiet).kept == [cell.name for cell in plan.cells]
    assert collect(fewer, resumed[0]).floor is None
    assert collect(plan, resumed[0]).floor is not None


def test_cells_of_a_seed_and_density_share_one_mask(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    names = sorted(path.name.rsplit("-", 1)[0] for path in (out / "masks").iterdir())
    assert names == ["saliency-0.3-0", "saliency-0.3-1"]
    longer = plan.suite.methods[0].model_copy(update={"name": "longer", "config": {"epochs": 2}})
    rows = plan.suite.model_copy(update={"methods": [longer]})
    before = files(out / "masks")
    assert run_suite(dataclasses.replace(plan, suite=rows, only=(), seed_count=1), out, quiet).measured == ["longer-0"]
    assert files(out / "masks") == before  # neither time nor byte


def test_a_budget_stops_before_a_cell_that_would_exceed_it(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    shutil.rmtree(out / "cells" / "rl-1")
    note = json.loads((out / "cells/rl-0/cell.json").read_text())
    (out / "cells/rl-0/cell.json").write_text(json.dumps(note | {"seconds": 1e6}))
    outcome = run_suite(plan, out, quiet, budget_seconds=1000)
    assert outcome.missing == ["rl-1"]
    assert outcome.measured == []
    assert not (out / "cells" / "rl-1").exists()


def test_two_runs_in_one_folder_are_refused(plan, resumed):
    out, _, _ = resumed

    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="is in use"):
            run_suite(plan, out, quiet)


def test_a_failed_cell_is_reported_and_the_others_are_measured(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    wild = plan.suite.methods[2].model_copy(
        update={"name": "wild", "config": {"epochs": 1, "learning_rate": 1e6, "momentum": 0.99}}
    )
    rows = [wild, *plan.suite.methods]
    suite = plan.suite.model_copy(update={"methods": rows})
    wanted = dataclasses.replace(plan, suite=suite, only=("wild", "SalUn", "RL"), seed_count=1)
    outcome = run_suite(wanted, out, quiet)
    assert list(outcome.failed) == ["wild-0"]
    assert outcome.kept == ["salun-0", "rl-0"]
    assert not (out / "cells" / "wild-0").exists()


def test_a_damaged_base_model_is_trained_again_with_the_same_result(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    weights = out / "base" / "model.safetensors"
    wanted = weights.read_bytes()
    weights.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    outcome = run_suite(dataclasses.replace(plan, only=("RL",), seed_count=1), out, quiet)
    assert outcome.kept == ["rl-0"]
    assert weights.read_bytes() == wanted
