"""Arguments and options that several verbs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", metavar="M", help="A folder, LINE or LINE@VERSION in the store, or s3://.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="D",
        help="A YAML spec, a folder, parquet, `digits` or torchvision:NAME. Default: the model card's.",
    ),
]
Forget = Annotated[str, typer.Option("--forget", metavar="F", help="The forget set: a YAML or JSON file, or s3://.")]
_STORE = typer.Option("--store", envvar="SALUN_STORE_URI", help="The object store: s3://bucket/prefix.")
Store = Annotated[str, _STORE]
OptionalStore = Annotated[str | None, _STORE]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the inputs and print the plan; write nothing.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")]
WorkDir = Annotated[Path | None, typer.Option("--work-dir", help="Folder of the steps. Default: .salun/runs/RUN.")]
Actor = Annotated[
    str, typer.Option("--actor", envvar="SALUN_ACTOR", help="Your name in the audit log. Default: your login.")
]
Reason = Annotated[str, typer.Option("--reason", help="The reason, for the audit log. No personal data.")]


def who(actor: str) -> str:
    """Return the name for the audit log: the one that was given, or the login."""
    if actor:
        return actor
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return "unknown"


def read_settings(
    pairs: list[str], file: Path | None = None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read settings from a file, options and KEY=VALUE pairs, each of which overrides those before it. Not validated.

    Dots in a key separate sections (`method_config.epochs=3`), and values are read as YAML. UsageError if the file does
    not hold a mapping, or a pair has the wrong form.
    """
    from salun_core.config import parse_text, read_document
    from salun_core.errors import UsageError

    settings = read_document(file) if file else {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file} has no settings", f"it is a {type(settings).__name__}", "write `key: value` lines")
    settings |= options or {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair!r} is not a setting", "it must have the form KEY=VALUE", "see --help")
        section = settings
        *outer, key = name.split(".")
        for part in outer:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {pair!r} does not fit", f"{part} is not a section", "correct the name")
        section[key] = parse_text(value, f"--set {name}")
    return settings
