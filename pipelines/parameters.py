"""Reads the run form from the command line, as the compiled pipeline declares it, and names every fault at once."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipelines.packages import Package
from salun_core.errors import UsageError

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_parameters(
    package: Package, words: Sequence[str], environ: Mapping[str, str], needed: Collection[str] | None = None
) -> dict[str, Any]:
    """Read `--model-line digits --density=0.3 --dry-run` into the run form.

    Args:
        package: whose form it is.
        words: of the command line that are no options of the command.
        environ: `SALUN_STORE_URI` stands for `--store-uri`.
        needed: the parameters that must be there; else all that have no default.

    Returns:
        The values that were given, by the parameter's name; Kubeflow fills in the defaults.

    Raises:
        UsageError: unknown, missing or wrong values; all are listed.
    """
    declared, faults, found = package.inputs, list[str](), dict[str, Any]()
    rest = list(words)
    while rest:
        flag, given, text = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in declared:
            faults.append(_unknown(flag, declared))
            if rest and not rest[0].startswith("--"):
                rest.pop(0)  # its value
            continue
        kind = declared[name]["parameterType"]
        try:
            found[name] = _value(kind, text if given else _next(kind, rest))
        except ValueError as error:
            faults.append(f"{flag} {error}")
    if "store_uri" in declared and environ.get("SALUN_STORE_URI"):
        found.setdefault("store_uri", environ["SALUN_STORE_URI"])
    bad = {fault.split()[0] for fault in faults}
    if needed is None:
        needed = [name for name, item in declared.items() if not item.get("isOptional")]
    missing = [_flag(name) for name in needed if name not in found]
    faults += [f"{flag} is missing" for flag in missing if flag not in bad]
    if faults:
        remedy = f"its parameters: {', '.join(map(_flag, declared))}"
        raise UsageError(f"the parameters do not fit {package.name}", "; ".join(faults), remedy)
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _unknown(flag: str, declared: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(flag, [_flag(name) for name in declared], n=1, cutoff=0.5)
    return f"{flag[:60]} is unknown" + (f" (did you mean {near[0]}?)" if near else "")


def _next(kind: str, rest: list[str]) -> str | None:
    """Take the value that follows a flag; a flag of yes or no stands alone unless a truth value follows."""
    if not rest or (kind == "BOOLEAN" and rest[0].lower() not in _TRUTH):
        return "true" if kind == "BOOLEAN" else None
    return None if rest[0].startswith("--") else rest.pop(0)


def _value(kind: str, text: str | None) -> object:
    if text is None:
        raise ValueError("needs a value")
    if kind == "NUMBER_INTEGER":
        return _whole(text)
    if kind == "NUMBER_DOUBLE":
        return _number(text)
    if kind == "BOOLEAN":
        if text.lower() not in _TRUTH:
            raise ValueError("is true or false")
        return _TRUTH[text.lower()]
    if kind in ("STRUCT", "LIST"):
        return _json(text, dict if kind == "STRUCT" else list)
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("needs a whole number") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("needs a number")
    return value


def _json(text: str, kind: type) -> object:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"needs a JSON {'object' if kind is dict else 'list'}")
    return value
