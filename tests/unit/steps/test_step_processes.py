"""A step in two gloo processes that it started itself: the same mask, one model, and the very error of a process."""

import json
import os
from dataclasses import replace

import pytest
import torch

from salun_core.errors import IntegrityError, SalunError
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from salun_core.steps.processes import in_processes
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks.run_facts import read_run_facts
from tests.support.failing_steps import breaks, dies, second_fails

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forked_processes"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts processes on a CPU"),
]
QUICK = {"epochs": 1, "learning_rate": 0.0005}


@pytest.fixture
def work(tmp_path, digits_model, monkeypatch):
    """A run that forgets 600 digits (three chunks), with one thread a process; and a folder for what it makes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SALUN_LOG", "json")
    ids = sorted(load_model(digits_model).split.train)[:600]
    (tmp_path / "forget.json").write_text(json.dumps({"kind": "samples", "ids": ids}))
    return RunContext(digits_model, str(tmp_path / "forget.json"), run="run-7"), tmp_path


def events(capfd):
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    return [(line["event"], line.get("run")) for line in map(json.loads, lines)]


def test_two_processes_make_the_mask_of_one_and_one_model(work, capfd):
    context, folder = work
    in_processes(2, compute_mask, context, Recipe(), folder / "mask")
    assert events(capfd)[:2] == [("step_started", "run-7"), ("step_finished", "run-7")]  # the first process alone logs
    alone = compute_mask(replace(context, run=""), Recipe(), folder / "alone")
    assert SaliencyMask.load(folder / "mask").digest == alone.digest

    in_processes(
        2, run_unlearning, context, Recipe(method="salun", method_config=QUICK), folder / "mask", folder / "after"
    )
    assert read_run_facts(folder / "after", "salun").environment["processes"] == "2"
    assert load_model(folder / "after").digest != load_model(context.before).digest
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_the_error_of_a_process_comes_back_as_it_was():
    with pytest.raises(IntegrityError) as caught:
        in_processes(2, second_fails, IntegrityError)
    assert str(caught.value) == "a file: is damaged. To fix it: fetch it again."
    assert caught.value.exit_code == 5


def test_a_process_that_dies_or_breaks_is_an_error_too(capfd):
    with pytest.raises(SalunError, match="it ended with exit code 7"):
        in_processes(2, dies)
    with pytest.raises(SalunError, match="exit code 1"):
        in_processes(2, breaks)
    failed, *_ = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "process_failed" in line]
    assert failed["error"] == "ZeroDivisionError"  # without its message, which may name a sample
    assert "in breaks" in failed["traceback"]


def test_one_process_is_this_one(monkeypatch):
    seen = []
    in_processes(1, seen.append, 1)
    in_processes(0, seen.append, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun has started us
    in_processes(4, seen.append, 4)
    assert seen == [1, 0, 4]
