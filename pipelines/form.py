"""The parameters of a pipeline: the run form, and the resources and the node of its steps."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from kfp import dsl
from pydantic import Field
from pydantic.fields import FieldInfo

import components
from pipelines.callers import without_source_lines
from salun_core.config import Document
from salun_core.steps.run_form import DeletionSweepForm, RunForm, UnlearningForm

# Not zero: Kubernetes takes a limit of 0 for none.
_QUANTITY = r"^([1-9][0-9]*(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


class PlacementForm(Document):
    """The resources and the node of the steps that hold a model.

    Whatever becomes a resource of a pod is text: Kubeflow reads these parameters as text, and a number would give a pod
    without the resource, and no error.
    """

    gpu_count: str = Field(
        default="1",
        pattern=r"^[1-9][0-9]{0,2}$",
        description="Accelerators for each step that computes; one process each.",
    )
    accelerator: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        description="Kind of accelerator, such as nvidia.com/gpu, nvidia.com/gpu.shared or nvidia.com/mig-1g.10gb.",
    )
    cpu: str = Field(
        default="4",
        pattern=_QUANTITY,
        description="Processor cores for each step that loads a model, such as 4 or 500m.",
    )
    memory: str = Field(
        default="16Gi", pattern=_QUANTITY, description="Memory for each step that loads a model, such as 16Gi."
    )
    node_selector: dict[str, str] = Field(default={}, description="Labels that the nodes must have, as a JSON object.")
    tolerations: list[dict[str, str]] = Field(default=[], description="Taints that the pods tolerate, as a JSON list.")


PLACEMENT = tuple(PlacementForm.model_fields)


def pipeline(name: str, form: type[RunForm] | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that turns a function into a pipeline.

    The function gets one argument with an attribute for each parameter of the form, and the form's defaults and
    descriptions go into the compiled pipeline. Without a form the function declares its parameters itself.
    """

    def decorate(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - kfp has no types
        with without_source_lines():
            return dsl.pipeline(name=name)(_with_parameters(function, form) if form else function)

    return decorate


def _with_parameters(function: Callable[..., Any], form: type[RunForm]) -> Callable[..., Any]:
    described = _fields(form)
    parameters = [_parameter(name, field) for name, field in described]
    parameters.sort(key=lambda item: item.default is not inspect.Parameter.empty)  # the required ones come first

    def with_parameters(*channels: Any) -> None:  # noqa: ANN401
        function(SimpleNamespace(**{item.name: channel for item, channel in zip(parameters, channels, strict=True)}))

    lines = [f"    {name}: {field.description}" for name, field in described]
    with_parameters.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines])
    with_parameters.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_parameters


def _fields(form: type[RunForm]) -> list[tuple[str, FieldInfo]]:
    """Return the fields of a pipeline: those of its form, and the placement."""
    return list({**form.model_fields, **PlacementForm.model_fields}.items())


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return a field as a parameter that kfp understands; settings of a method travel as JSON text."""
    default, kind = field.default, field.annotation
    if name == "method_config":
        default, kind = json.dumps(default), str
    if field.is_required():
        default = inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)


def component_faults() -> Iterator[str]:
    """Yield each parameter of a component whose default is not that of the run form.

    The source of a component runs alone in a container, so that its defaults must be literals in its signature.
    """
    forms = (UnlearningForm, DeletionSweepForm)
    wanted = {name: _parameter(name, field).default for form in forms for name, field in _fields(form)}
    for module in pkgutil.iter_modules(components.__path__):
        if module.ispkg:
            step = getattr(importlib.import_module(f"components.{module.name}"), module.name)
            for name, item in inspect.signature(step.python_func).parameters.items():
                default = wanted.get(name, inspect.Parameter.empty)
                if inspect.Parameter.empty not in (default, item.default) and item.default != default:
                    yield f"{module.name}: {name} is {item.default!r}, in the run form {default!r}"
