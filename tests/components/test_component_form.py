"""Rules for the source of every component: thin bodies, late imports, a description of every parameter."""

import ast
import importlib
import inspect
from pathlib import Path

import docstring_parser
import pytest

from components._image import IMAGE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "components").glob("*/component.py"))
NAMES = [path.parent.name for path in SOURCES]
MAX_LINES = 15
RUN = ("fetch_model", "compute_mask", "unlearn", "evaluate", "gate_publish")


def function_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return tree, function


def body_lines(function):
    """Lines of code after the docstring, blank ones left out."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return sum(statement.end_lineno - statement.lineno + 1 for statement in statements)


def test_all_steps_are_there():
    others = {"claim_requests", "settle_requests", "purge_store"}
    assert {*RUN, *others, "conclude", "sweep_compact"} == set(NAMES)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_body_is_thin(path):
    _, function = function_of(path)
    assert body_lines(function) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_module_scope_imports_only_kfp_and_the_image(path):
    tree, _ = function_of(path)
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {"components._image"} <= imported <= {"kfp", "typing", "components._image"}
    assert not [node for node in tree.body if isinstance(node, ast.Assign | ast.Import)]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_explained(name):
    step = getattr(importlib.import_module(f"components.{name}.component"), name)
    told = {item.arg_name for item in docstring_parser.parse(step.python_func.__doc__).params if item.description}
    assert told == set(inspect.signature(step.python_func).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_component_runs_in_the_image_and_installs_nothing(name):
    container = getattr(importlib.import_module(f"components.{name}.component"), name).component_spec.implementation
    assert container.container.image == IMAGE
    assert not [text for text in container.container.command if "pip install" in text or "-m pip" in text]
