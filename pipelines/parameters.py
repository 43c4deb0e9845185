"""Reads the run form from the command line, as the compiled pipeline declares it, and reports all faults at once."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import FiniteFloat, Json, TypeAdapter, ValidationError

from pipelines.packages import Package
from salun_core.errors import UsageError

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
    """Read `--model-line digits --density=0.3 --dry-run` into the run form.

    Args:
        package: the pipeline that the form belongs to.
        words: the words of the command line that are not options of the command.
        environ: `SALUN_STORE_URI` stands for `--store-uri`.
        needed: the required parameters; else all that have no default.

    Returns:
        The values that were given, by the parameter's name; Kubeflow fills in the defaults.

    Raises:
        UsageError: unknown, missing or wrong values; all are listed.
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


def _next(kind: str, rest: list[str]) -> str | None:
    """Take the value that follows a flag; yes or no may be left out for yes."""
    if kind == "BOOLEAN" and (not rest or rest[0].lower() not in _TRUTH):
        return "true"
    return rest.pop(0) if rest and not rest[0].startswith("--") else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
