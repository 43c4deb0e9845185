"""Builds options from the fields of the run form, which has their defaults, bounds and descriptions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import annotated_types
import typer

from salun_core.steps.run_form import DeletionSweepForm, RunForm, UnlearningForm

DEFAULTS = DeletionSweepForm(model_line="", store_uri="")
"""Every default of the run form."""

_FIELDS = {**UnlearningForm.model_fields, **DeletionSweepForm.model_fields}
_FLAGS = {
    "model_line": ("--line", "--model-line"),
    "store_uri": ("--store", "--store-uri"),
    "forget_manifest_uri": ("--forget", "--forget-manifest-uri"),
    "policy_uri": ("--policy", "--policy-uri"),
}
_VARIABLES = {"store_uri": "SALUN_STORE_URI"}


def form_option(name: str, **changes: Any) -> Any:  # noqa: ANN401 - typer's OptionInfo
    """Return the option for a field of the run form, with other arguments of `typer.Option` if given."""
    field = _FIELDS[name]
    settings: dict[str, Any] = {"help": field.description, "envvar": _VARIABLES.get(name)}
    if field.annotation is int:  # typer has no ranges with an open end: the form itself checks the other numbers
        for bound in field.metadata:
            settings |= {"min": bound.ge} if isinstance(bound, annotated_types.Ge) else {}
            settings |= {"max": bound.le} if isinstance(bound, annotated_types.Le) else {}
    return typer.Option(*_FLAGS.get(name, (f"--{name.replace('_', '-')}",)), **{**settings, **changes})


def with_form(form: type[RunForm], *, required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds an option for each field of a run form to a verb.

    The first two arguments of the verb are options by field: those that were given on the command line or in the
    environment, and those from the settings file. `method_config` has no option: the verb reads it from `--set`.
    `required` is whether the fields without a default must be given as options.
    """
    names = [name for name in form.model_fields if name != "method_config"]

    def parameter(name: str) -> inspect.Parameter:
        field = form.model_fields[name]
        kind: Any = field.annotation if required or not field.is_required() else field.annotation | None  # type: ignore[operator]
        default = field.default if not field.is_required() else inspect.Parameter.empty if required else None
        annotation = Annotated[kind, form_option(name)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        def with_options(context: typer.Context, **options: Any) -> None:  # noqa: ANN401 - of several types
            values = {name: options.pop(name) for name in names}
            sources = {name: context.get_parameter_source(name).name for name in names}  # type: ignore[union-attr]
            shared = {name: value for name, value in values.items() if sources[name] == "DEFAULT_MAP"}
            given = {name: values[name] for name in names if name not in shared and sources[name] != "DEFAULT"}
            verb(given, shared, **options)

        _, _, *own = inspect.signature(verb, eval_str=True).parameters.values()
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        own = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own]
        signature = inspect.Signature([context, *map(parameter, names), *own])
        with_options.__signature__ = signature  # type: ignore[attr-defined]
        with_options.__annotations__ = {}
        with_options.__doc__ = verb.__doc__
        return with_options

    return decorate
