"""The run form is the only source of defaults and descriptions: no component, pipeline or option differs from it."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
import typer

from components.evaluate import evaluate
from components.unlearn import unlearn
from pipelines import compile as compiling
from pipelines import form as forms
from pipelines.form import PlacementForm
from pipelines.packages import load_package
from salun_core.cli.app import app
from salun_core.config import parse
from salun_core.errors import IntegrityError, UsageError
from salun_core.evaluation.evidence import EVALUATED
from salun_core.steps.run_form import DeletionSweepForm, RunForm, UnlearningForm
from salun_core.sweeps.policy import BatchLimits

ROOT = Path(__file__).resolve().parents[2]
PIPELINES = {
    "unlearning": UnlearningForm,
    "deletion-sweep": DeletionSweepForm,
    "deletion-sweep-compact": DeletionSweepForm,
}
TYPES = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", bool: "BOOLEAN", list[str]: "LIST"}


def text(value):
    return json.dumps(value) if isinstance(value, dict) else value


@pytest.mark.parametrize("name", PIPELINES)
def test_each_pipeline_has_the_fields_of_its_form(name):
    inputs, form = load_package(name).inputs, PIPELINES[name]
    assert set(inputs) == {*form.model_fields, *forms.PLACEMENT}
    for field_name, field in form.model_fields.items():
        found = inputs[field_name]
        assert found["description"] == field.description
        assert found["parameterType"] == TYPES.get(field.annotation, "STRING")
        assert found.get("isOptional", False) is not field.is_required()
        assert field.is_required() or found["defaultValue"] == text(field.default)


def test_the_form_repeats_how_many_images_are_measured():
    assert RunForm.model_fields["evaluation_samples"].default == str(EVALUATED)


def test_no_default_of_a_component_differs():
    assert list(forms.component_faults()) == []


@pytest.mark.parametrize(
    ("step", "name", "value"),
    [(unlearn, "tune_budget", "10e"), (unlearn, "seed", 1), (evaluate, "extra_metrics", "kl")],
)
def test_a_default_that_drifts_stops_the_compiler(monkeypatch, step, name, value):
    signature = inspect.signature(step.python_func)
    changed = [item.replace(default=value) if item.name == name else item for item in signature.parameters.values()]
    monkeypatch.setattr(step.python_func, "__signature__", signature.replace(parameters=changed), raising=False)
    with pytest.raises(IntegrityError, match=f"{name} is {value!r}, in the run form"):
        compiling.compile_all()


def options(verb):
    command = typer.main.get_command(app)
    for word in verb.split():
        command = command.commands[word]
    return {item.name: item for item in command.params}


@pytest.mark.parametrize(("verb", "form"), [("run", UnlearningForm), ("sweep", DeletionSweepForm)])
def test_salun_run_and_sweep_have_an_option_for_each_field(verb, form):
    found = options(verb)
    for name, field in form.model_fields.items():
        if name != "method_config":  # --set
            assert found[name].help == field.description
            assert field.is_required() or found[name].default == field.default


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("mask", {"density": "density"}),
        ("unlearn", {name: name for name in ("method", "seed", "tune", "tune_budget")} | {"policy": "policy_uri"}),
        ("evaluate", {name: name for name in ("extra_metrics", "retrain_reference", "evaluation_samples")}),
        ("gate", {"policy": "policy_uri"}),
    ],
)
def test_the_verbs_of_single_steps_have_the_same_defaults(verb, names):
    found = options(verb)
    for option, field in names.items():
        assert found[option].default == DeletionSweepForm.model_fields[field].default


def test_a_default_is_written_once_outside_the_components():
    """The signature of a component must be literal; every other place reads the form."""
    for folder in ("salun_core/cli", "salun_core/steps", "pipelines"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.name != "run_form.py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                assert "20e" not in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)], path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_count", "0"),
        ("gpu_count", "1.5"),
        ("gpu_count", "9" * 30),
        ("memory", "0"),
        ("memory", "0.0Gi"),
        ("cpu", "0"),
    ],
)
def test_a_quantity_that_no_pod_can_have_is_refused(name, value):
    with pytest.raises(UsageError, match=name):
        parse(PlacementForm, {name: value}, "the run form")
    parse(PlacementForm, {"cpu": "0.5", "memory": "1.5Gi", "gpu_count": "8"}, "the run form")


@pytest.mark.parametrize("hours", [float("inf"), float("nan"), 1e300])
def test_a_wait_that_no_clock_can_count_is_refused(hours):
    with pytest.raises(UsageError, match="max_wait_hours"):
        parse(BatchLimits, {"max_wait_hours": hours}, "the run form")
