"""Trials of the pipeline's runs at quick size, and the harness itself: each seeded defect of the steps is found."""

import json
import secrets
from dataclasses import asdict

import pytest

from tests.reliability.trial_mutants import DEFECTS
from tests.reliability.trials import SCENARIOS, Ended, run_trials
from tests.support.made_once import made_once

pytestmark = pytest.mark.s3
DRAWN = [{"scenario": "recreated", "seed": 20}, {"scenario": "net killed", "seed": 21}]


@pytest.fixture(scope="module")
def ended(s3_server, tmp_path_factory):
    """The product and each seeded defect in the same trials, at once, and once for all test workers."""
    (found,) = made_once(tmp_path_factory, "trials", _run).iterdir()
    return [Ended(**trial) for trial in json.loads(found.read_text())]


def _run(folder):
    product = [*DRAWN, *(dict(defect.trial) for defect in DEFECTS.values())]
    mutants = [{**defect.trial, "mutant": name} for name, defect in DEFECTS.items()]
    ended = run_trials(f"s3://salun/{secrets.token_hex(8)}", [*product, *mutants], workers=2)
    (folder / "ended.json").write_text(json.dumps([asdict(trial) for trial in ended]))


def test_runs_that_are_killed_lose_nothing_and_block_nobody(ended):
    product = [trial for trial in ended if trial.mutant is None]
    assert {trial.scenario for trial in product} == set(SCENARIOS)
    assert {trial.seed: trial.notes for trial in product if trial.faults} == {}
    assert sum(trial.kills for trial in product) >= 4


@pytest.mark.parametrize("name", DEFECTS)
def test_a_seeded_defect_of_the_steps_is_found(ended, name):
    (trial,) = [trial for trial in ended if trial.mutant == name]
    assert DEFECTS[name].caught_as in trial.faults
