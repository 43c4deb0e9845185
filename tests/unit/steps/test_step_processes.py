"""A step in two gloo processes that it started itself: the same mask, one model, and the very error of a process."""

import json
import os
from pathlib import Path

import pytest
import torch
from kfp import dsl

from components.compute_mask import compute_mask as mask_component
from components.unlearn import unlearn as unlearn_component
from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.methods.recipe import Recipe
from salun_core.models import load_model
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from salun_core.steps.processes import in_processes
from salun_core.tasks.run_facts import read_run_facts
from tests.support.failing_steps import breaks, dies, second_fails

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="counts processes on a CPU")]
QUICK = json.dumps({"epochs": 1, "learning_rate": 0.0005, "device": "cpu"})


@pytest.fixture
def work(tmp_path, digits_model, monkeypatch):
    """A model, 600 digits to forget (three chunks), and one thread a process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SALUN_LOG", "json")
    ids = sorted(load_model(digits_model).split.train)[:600]
    (tmp_path / "forget.json").write_text(json.dumps({"kind": "samples", "ids": ids}))
    return dsl.Model(uri=str(digits_model)), str(tmp_path / "forget.json"), tmp_path


def events(capfd):
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    return [(line["event"], line.get("run")) for line in map(json.loads, lines)]


def test_two_processes_make_the_mask_of_one_and_one_model(work, capfd):
    model, forget, folder = work
    mask, unlearned = dsl.Artifact(uri=str(folder / "mask")), dsl.Model(uri=str(folder / "after"))
    mask_component.python_func(model, forget, 0.5, mask, run_id="run-7", processes=2)
    alone = compute_mask(RunContext(load_path(model), forget, device="cpu"), Recipe(), folder / "alone")
    assert SaliencyMask.load(mask.path).digest == alone.digest == mask.metadata["digest"]
    assert events(capfd)[:2] == [("step_started", "run-7"), ("step_finished", "run-7")]  # the first process alone logs

    unlearn_component.python_func(model, mask, forget, unlearned, method_config=QUICK, processes=2)
    facts = read_run_facts(load_path(unlearned), "salun")
    assert facts.environment["processes"] == "2"
    assert unlearned.metadata["seconds"] == facts.seconds["unlearn"]
    assert load_model(load_path(unlearned)).digest != load_model(load_path(model)).digest
    assert os.environ["OMP_NUM_THREADS"] == "1"


def load_path(artifact):
    return Path(artifact.path)


def test_the_error_of_a_process_comes_back_as_it_was(work):
    model, forget, folder = work
    mask = dsl.Artifact(uri=str(folder / "mask"))
    with pytest.raises(UsageError, match="density") as caught:
        mask_component.python_func(model, forget, 1.5, mask, processes=2)
    assert caught.value.exit_code == 2
    assert not (folder / "mask").exists()


def test_the_error_may_be_of_another_process_than_the_first():
    with pytest.raises(IntegrityError) as caught:
        in_processes(2, second_fails, IntegrityError)
    assert str(caught.value) == "a file: is damaged. To fix it: fetch it again."


def test_a_process_that_dies_or_breaks_is_an_error_too(capfd):
    with pytest.raises(SalunError, match="it ended with exit code 7"):
        in_processes(2, dies)
    with pytest.raises(SalunError, match="exit code 1"):
        in_processes(2, breaks)
    assert "ZeroDivisionError: by hand" in capfd.readouterr().err


def test_one_process_is_this_one(monkeypatch):
    seen = []
    in_processes(1, seen.append, 1)
    in_processes(0, seen.append, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun has started us
    in_processes(4, seen.append, 4)
    assert seen == [1, 0, 4]
