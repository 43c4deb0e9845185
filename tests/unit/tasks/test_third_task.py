"""A third task is one package and one row: the steps run it as they run the two that ship."""

import json
import sys

import pytest

from salun_core.data import DataSpec
from salun_core.errors import GateRefusedError, UsageError
from salun_core.methods.recipe import Recipe
from salun_core.registry.lookup import read_head, read_version
from salun_core.saliency import SaliencyMask
from salun_core.steps.claim import sweep_policy
from salun_core.steps.context import RunContext
from salun_core.steps.evaluation import evaluate
from salun_core.steps.run import run_all
from salun_core.steps.run_form import UnlearningForm
from salun_core.tasks import TASKS, open_inputs, register_model, task_of
from salun_core.tasks.line import OpenLine
from salun_core.tasks.task import Task
from tests.support.forked import CONTEXT
from tests.support.toy_task import ToyTask, train_toy

SETTINGS = {"epochs": 20, "learning_rate": 0.001, "gradient_clip": 1.0, "optimizer": "adam", "weight_decay": 0.0}


@pytest.fixture(autouse=True)
def row(monkeypatch):
    task: Task = ToyTask()
    monkeypatch.setitem(TASKS, "toy", task)
    return task


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "model"
    train_toy(folder, DataSpec(source="digits"))
    return folder


def policy(path, **least):
    rules = [{"metric": name, "op": ">=", "value": value, "reason": "a toy must too"} for name, value in least.items()]
    path.write_text(json.dumps({"format": "salun.policy/v1", "name": "toys", "rules": rules}))
    return str(path)


def form(store, tmp_path, **settings):
    (tmp_path / "forget.json").write_text(json.dumps({"kind": "class", "class_id": 3}))
    given = {"method": "ascent", "method_config": SETTINGS, "retrain_reference": True, **settings}
    places = {"model_line": "toys", "store_uri": store.uri, "forget_manifest_uri": str(tmp_path / "forget.json")}
    return UnlearningForm(**places, **given)


def test_the_card_selects_the_task(toy, row):
    assert task_of(toy) is row


@pytest.mark.s3
def test_a_run_masks_unlearns_evaluates_and_publishes(toy, store, tmp_path):
    parent = register_model(store, "toys", toy, "train", 1000)
    gate = policy(tmp_path / "policy.json", UA=0.4, RA=0.9)
    made = run_all(form(store, tmp_path, policy_uri=gate), tmp_path / "run", run="run-1")
    evidence, mask = made.evidence, SaliencyMask.load(tmp_path / "run" / "mask.safetensors")
    assert evidence.metrics["UA"].after > evidence.metrics["UA"].before
    assert evidence.metrics["UA"].reference is not None
    assert (evidence.integrity.frozen_changed, evidence.measured.mask) == (0, mask.digest)
    assert 0 < evidence.integrity.weights_changed <= mask.k
    assert (evidence.run.method, evidence.run.density) == ("ascent", pytest.approx(0.5, abs=1e-3))
    head, _ = read_head(store, "toys")
    version = read_version(store, "toys", head.version)
    assert (version.parent, version.method, version.forget_count) == (parent, "ascent", evidence.forgotten.count)
    assert set(version.files) == {
        *("model.safetensors", "model.json", "split.parquet"),
        *("evidence.json", "decision.json", "report.html"),
    }


@pytest.mark.s3
def test_the_gate_refuses_a_toy_too_and_its_recipes_escalate(toy, store, tmp_path):
    parent = register_model(store, "toys", toy, "train", 1000)
    gate = policy(tmp_path / "policy.json", UA=1.1)
    with pytest.raises(GateRefusedError):
        run_all(form(store, tmp_path, policy_uri=gate, retrain_reference=False), tmp_path / "run")
    assert read_head(store, "toys")[0].version == parent
    recipes = sweep_policy(OpenLine(store, "toys"), Recipe(method="ascent", seed=4)).recipes
    assert [(recipe.method, recipe.seed) for recipe in recipes] == [("ascent", 4), ("retrain", 4)]


@pytest.mark.s3
def test_what_a_task_does_not_support_is_refused_before_any_work(toy, store, tmp_path):
    register_model(store, "toys", toy, "train", 1000)
    with pytest.raises(UsageError, match="a toy is not tuned"):
        run_all(form(store, tmp_path, tune=True), tmp_path / "run")
    with pytest.raises(UsageError, match="a toy autoencoder has no extra metrics"):
        run_all(form(store, tmp_path, extra_metrics="probe"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_toy_cannot_forget_a_concept_nor_be_compared_with_a_classifier(toy, digits_model, tmp_path):
    target = {"kind": "concept", "prompts": ["a three"], "anchor_prompt": "a four"}
    (tmp_path / "concept.json").write_text(json.dumps(target))
    with pytest.raises(UsageError, match="a toy knows no concepts"):
        open_inputs(toy, str(tmp_path / "concept.json"))
    (tmp_path / "forget.json").write_text(json.dumps({"kind": "class", "class_id": 3}))
    context = RunContext(toy, str(tmp_path / "forget.json"))
    with pytest.raises(UsageError, match="the model after is a classifier"):
        evaluate(context, digits_model, tmp_path / "evidence.json", tmp_path / "report.html")


def _open(folder):
    """Run in a fork of a process that imported torch and the command; end with 1 if more is imported than needed."""
    task_of(folder).load(folder)
    sys.exit(any(name in sys.modules for name in ("diffusers", "transformers", "optuna")))


def test_opening_a_classifier_does_not_import_diffusers(digits_model):
    """Both shipped tasks are in the table, but the libraries of one are not loaded for the other."""
    process = CONTEXT.Process(target=_open, args=(digits_model,))
    process.start()
    process.join()
    assert process.exitcode == 0
