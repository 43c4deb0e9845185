"""The figures of the table, against the evidence that they were read from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics

import pytest

from lab.bench.page import results_json, table
from lab.bench.results import Results, collect
from salun_core.config import parse_text
from salun_core.digest import sha256_file
from salun_core.errors import UsageError

pytestmark = pytest.mark.slow


def evidence_of(out, cell):
    return json.loads((out / "cells" / cell / "evidence.json").read_text())


def test_rows_are_original_retrain_and_the_methods_in_their_order(plan, resumed):
    results = collect(plan, resumed[0])
    assert [row.name for row in results.rows] == ["original", "Retrain", "SalUn", "RL"]
    assert results.missing == ["salun-random-mask-0", "salun-random-mask-1"]


def test_a_table_cell_is_mean_deviation_and_mean_distance_to_the_reference(plan, resumed):
    out = resumed[0]
    metric = [evidence_of(out, f"salun-{seed}")["metrics"]["TA"] for seed in (0, 1)]
    values = [100 * item["after"] for item in metric]
    further = [json.loads((out / f"reference-{seed}-1/evidence.json").read_text())["metrics"]["TA"] for seed in (0, 1)]
    references = [(item["reference"], other["after"]) for item, other in zip(metric, further, strict=True)]
    pairs = [(item["after"], goal) for item, goals in zip(metric, references, strict=True) for goal in goals]
    gap = statistics.mean(abs(100 * (value - goal)) for value, goal in pairs)
    wanted = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({gap:.2f})"
    line = next(line for line in table(collect(plan, out)).splitlines() if line.startswith("| SalUn (30%)"))
    assert line.split(" | ")[3] == wanted


def test_the_average_gap_is_the_mean_of_the_parentheses(plan, resumed):
    lines = table(collect(plan, resumed[0])).splitlines()
    for line in (item for item in lines if item.startswith(("| SalUn", "| RL"))):
        cells = line.strip("| ").split(" | ")
        gaps = [float(cell.split("(")[1].rstrip(")")) for cell in cells[1:5]]
        assert float(cells[5].split(" ± ")[0]) == pytest.approx(statistics.mean(gaps), abs=0.011)


def test_seconds_are_of_mask_and_unlearning_and_passes_count_both(plan, resumed):
    out = resumed[0]
    run = evidence_of(out, "salun-1")["run"]
    row = next(row for row in collect(plan, out).rows if row.name == "SalUn")
    assert row.figures[1].seconds == run["seconds"]["mask"] + run["seconds"]["unlearn"]
    assert run["seconds"]["mask"] > 0
    forgotten = evidence_of(out, "salun-1")["forgotten"]
    assert row.figures[1].passes == forgotten["count"] + forgotten["train_count"]  # one pass of scores, one epoch


def test_one_base_model_of_all_seeds_counts_once(plan, resumed):
    results = collect(plan, resumed[0])
    assert len(results.rows[0].figures) == 1
    assert [(item.seed, item.reference) for item in results.rows[1].figures] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_floor_is_the_gap_of_a_reference_to_the_others_of_its_seed(plan, resumed):
    results = collect(plan, resumed[0])
    by_seed = {seed: [item for item in results.rows[1].figures if item.seed == seed] for seed in (0, 1)}
    gaps = []
    for first, second in by_seed.values():
        assert first.values != second.values  # trained with another seed
        distances = [abs(first.values[name] - second.values[name]) for name in ("UA", "RA", "TA", "MIA")]
        assert first.gap == second.gap == pytest.approx(statistics.mean(distances))
        gaps.append(100 * first.gap)
    assert results.floor == pytest.approx(statistics.mean(gaps))


def test_a_seed_without_all_references_leaves_the_first_one_to_all_seeds(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    (out / "reference-1-1" / "evidence.json").write_text("{}")  # changed: no longer what was measured
    results = collect(plan, out)
    assert results.floor is None
    assert results.missing[-1] == "reference-1-1"
    assert [(item.seed, item.reference, item.gap) for item in results.rows[1].figures] == [(0, None, 0), (1, None, 0)]
    for row in results.rows[2:]:
        for item in row.figures:
            found = evidence_of(out, f"{row.name.lower()}-{item.seed}")["metrics"]["gap"]["after"]
            assert item.gap == pytest.approx(found)  # of the reference that the cell was evaluated against


def test_cells_with_the_goal_of_an_earlier_run_are_missing(plan, resumed, tmp_path):
    out = shutil.copytree(resumed[0], tmp_path / "copy")
    evidence = evidence_of(out, "rl-1")
    evidence["measured"]["reference"] = "0" * 64
    evidence["created_at"] = "2000-01-01T00:00:00Z"
    (out / "cells/rl-1/evidence.json").write_text(json.dumps(evidence))
    note = json.loads((out / "cells/rl-1/cell.json").read_text())
    note["evidence"] = sha256_file(out / "cells/rl-1/evidence.json")
    (out / "cells/rl-1/cell.json").write_text(json.dumps(note))
    results = collect(plan, out)
    assert "rl-1" in results.missing
    assert [item.seed for item in results.rows[-1].figures] == [0]


def test_results_have_their_command_without_host_or_path(plan, resumed):
    results = collect(plan, resumed[0])
    text = results_json(results).decode()
    assert results.command == "salun bench run digits --size cpu"
    assert results.environment["threads"] == "1"
    assert str(resumed[0]) not in text
    import socket

    assert socket.gethostname() not in text
    assert Results.model_validate(parse_text(text, "results")) == results


def test_a_folder_without_a_cell_of_the_suite_is_refused(plan, resumed, tmp_path):
    with pytest.raises(UsageError, match="holds no cell"):
        collect(plan, tmp_path)
    size = plan.suite.sizes["cpu"].model_copy(update={"threads": 2})
    other = dataclasses.replace(plan, suite=plan.suite.model_copy(update={"sizes": {"cpu": size}}))
    with pytest.raises(UsageError, match="holds no cell"):
        collect(other, resumed[0])
