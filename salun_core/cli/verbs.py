"""Verbs that packages above the core add to `salun`, by the entry points `salun.verbs` of its own distribution.

An entry point has the name of a verb, with a dot for each space, and names its function: `"bench.run" =
"lab.cli.bench:run"`. One that names a class of groups, with the group's help as its docstring, adds that group. The
examples of the verbs are in an `examples.md` next to their module.

Other distributions add none: their code would run whenever `salun` starts, whatever SALUN_PLUGINS allows.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import TypeVar

from typer.core import TyperGroup

from salun_core.errors import UsageError

DISTRIBUTION, GROUP = "salun", "salun.verbs"

Function = TypeVar("Function", bound=Callable[..., None])

WITHOUT_SETTINGS: set[Callable[..., None]] = set()
"""Added verbs that need no settings file, so that a faulty one does not stop them."""

UNPARSED: set[Callable[..., None]] = set()
"""Added verbs whose arguments another program parses, `--help` included."""


def without_settings(function: Function) -> Function:
    """Mark a verb that needs no settings file."""
    WITHOUT_SETTINGS.add(function)
    return function


def unparsed(function: Function) -> Function:
    """Mark a verb whose arguments another program parses."""
    UNPARSED.add(function)
    return function


def added_verbs() -> tuple[dict[str, type[TyperGroup]], dict[str, Callable[..., None]]]:
    """Return the groups and the verbs that entry points add.

    A verb is absent if its package is not installed, as in the image of the pipelines. If its package cannot be
    imported, the verb reports this when it is called, and no other verb is affected.
    """
    groups: dict[str, type[TyperGroup]] = {}
    verbs: dict[str, Callable[..., None]] = {}
    for point in _entry_points():
        name = point.name.replace(".", " ")
        try:
            found = point.load()
        except Exception as error:  # noqa: BLE001 - importing runs any code
            if not _is_absent(point.module, error):
                verbs[name] = _broken(name, error)
            continue
        (groups if isinstance(found, type) else verbs)[name] = found
    # A broken group is shown by its verbs.
    return groups, {name: verb for name, verb in verbs.items() if not any(one.startswith(f"{name} ") for one in verbs)}


def _entry_points() -> importlib.metadata.EntryPoints:
    try:
        return importlib.metadata.distribution(DISTRIBUTION).entry_points.select(group=GROUP)
    except importlib.metadata.PackageNotFoundError:  # the source without an installation
        return importlib.metadata.EntryPoints()


def _is_absent(module: str, error: Exception) -> bool:
    """Whether an import failed because the module or a package above it does not exist."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def _broken(verb: str, error: Exception) -> Callable[..., None]:
    def broken() -> None:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"salun {verb} cannot be loaded", why, "install salun again") from error

    broken.__doc__ = "Not available: it cannot be loaded."
    return unparsed(broken)
