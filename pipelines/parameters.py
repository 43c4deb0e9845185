"""Reads the run form from the command line, as the compiled pipeline declares it, and reports all faults at once.

A pipeline knows only the types of its parameters. `read_form` parses the same values by the models that its first step
uses, so that a value out of range is refused before the run is submitted, with the same message.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import FiniteFloat, Json, TypeAdapter, ValidationError

from pipelines.packages import Package
from salun_core.config import parse, parse_text
from salun_core.errors import UsageError
from salun_core.steps.run_form import DeletionSweepForm, RunForm, UnlearningForm

FORMS: dict[str, type[RunForm]] = {
    "salun-unlearning": UnlearningForm,
    "salun-deletion-sweep": DeletionSweepForm,
}
"""The run form of each pipeline; those of its variants begin with the same name."""

_TRUTH = {"true", "yes", "1", "false", "no", "0"}
_TYPES: dict[str, tuple[TypeAdapter[Any], str]] = {
    "BOOLEAN": (TypeAdapter(bool), "must be true or false"),
    "LIST": (TypeAdapter(Json[list[Any]]), "must be a JSON list"),
    "NUMBER_DOUBLE": (TypeAdapter(FiniteFloat), "must be a number"),
    "NUMBER_INTEGER": (TypeAdapter(int), "must be a whole number"),
    "STRING": (TypeAdapter(str), "must be text"),
    "STRUCT": (TypeAdapter(Json[dict[str, Any]]), "must be a JSON object"),
}


def read_parameters(
    package: Package, words: Sequence[str], environ: Mapping[str, str], needed: Collection[str] | None = None
) -> dict[str, Any]:
    """Read `--model-line digits --density=0.3 --dry-run` into the values that were given, by the parameter's name.

    Kubeflow fills in the defaults. `SALUN_STORE_URI` stands for `--store-uri`. By default `needed` are all parameters
    without a default. UsageError lists all faults.
    """
    declared, faults, found = package.inputs, dict[str, str](), dict[str, Any]()
    rest = list(words)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        kind = declared[name]["parameterType"] if flag.startswith("--") and name in declared else ""
        given = text if equals else _next(kind, rest)
        if not kind:
            near = difflib.get_close_matches(flag, map(_flag, declared), n=1, cutoff=0.5)
            faults[flag] = f"{flag[:60]} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
        elif given is None:
            faults[flag] = f"{flag} needs a value"
        else:
            adapter, must = _TYPES[kind]
            try:
                found[name] = adapter.validate_python(given)
            except ValidationError:
                faults[flag] = f"{flag} {must}"
    if "store_uri" in declared and environ.get("SALUN_STORE_URI"):
        found.setdefault("store_uri", environ["SALUN_STORE_URI"])
    if needed is None:
        needed = [name for name, item in declared.items() if not item.get("isOptional")]
    faults = {_flag(name): f"{_flag(name)} is missing" for name in needed if name not in found} | faults
    if faults:
        remedy = f"its parameters: {', '.join(map(_flag, declared))}"
        raise UsageError(f"the parameters do not fit {package.name}", "; ".join(faults.values()), remedy)
    return found


def read_form(package: Package, given: Mapping[str, Any]) -> RunForm:
    """Parse the values of a run form, as `read_parameters` returns them, by the models that the first step uses.

    UsageError lists all faults.
    """
    from pipelines.form import PlacementForm

    placed = {name: value for name, value in given.items() if name in PlacementForm.model_fields}
    asked = {name: value for name, value in given.items() if name not in placed}
    form, faults = None, list[UsageError]()
    kind = next(kind for name, kind in FORMS.items() if package.name.startswith(name))
    try:
        if text := str(asked.pop("method_config", "")).strip():
            asked["method_config"] = parse_text(text, "method_config")
        form = parse(kind, asked, "the run form")
    except UsageError as error:
        faults.append(error)
    try:
        parse(PlacementForm, placed, "the placement of the steps")
    except UsageError as error:
        faults.append(error)
    if form is None or faults:
        why = "; ".join(fault.why if "fault" in fault.what else f"{fault.what}: {fault.why}" for fault in faults)
        raise UsageError(f"the parameters do not fit {package.name}", why, faults[0].remedy)
    return form


def _next(kind: str, rest: list[str]) -> str | None:
    """Take the value that follows a flag; yes or no may be left out for yes."""
    if kind == "BOOLEAN" and (not rest or rest[0].lower() not in _TRUTH):
        return "true"
    return rest.pop(0) if rest and not rest[0].startswith("--") else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
