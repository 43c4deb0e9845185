"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Option("--model", metavar="M", help="The model: a folder, LINE or LINE@VERSION in the store, or s3://.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="D",
        help="The data: a YAML spec, a folder, parquet, `digits` or torchvision:NAME; else as the model card says.",
    ),
]
Forget = Annotated[
    str, typer.Option("--forget", metavar="F", help="What to forget: a YAML or JSON file, or its s3:// address.")
]
Store = Annotated[
    str | None, typer.Option("--store", envvar="SALUN_STORE_URI", help="The store of model lines: s3://bucket/prefix.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the inputs, say what would be done, write nothing.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; may be given again.")
]

Tune = Annotated[bool, typer.Option("--tune", help="Search for the settings that you leave open, on validation data.")]
TuneBudget = Annotated[
    str, typer.Option("--tune-budget", metavar="B", help="Passes (200000), time (90s, 15m) or epochs (20e).")
]
Also = Annotated[
    str,
    typer.Option(
        "--also",
        metavar="NAMES",
        help="More measurements: lira[=MODELS], relearn[=STEPS], probe, decile, kl, tow, seeds[=RUNS].",
    ),
]
Actor = Annotated[
    str, typer.Option("--actor", envvar="SALUN_ACTOR", help="Who does it, for the audit log; your login unless given.")
]


def who(actor: str) -> str:
    """Return who does something, for the audit log: the one that is named, or the login."""
    if actor:
        return actor
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return "unknown"


def named_store(store: str | None) -> str:
    """Return the address of the store.

    Raises:
        UsageError: none is named.
    """
    from salun_core.errors import UsageError

    if not store:
        raise UsageError("no store is named", "a model line lies in a store", "give --store or set SALUN_STORE_URI")
    return store


def read_settings(pairs: list[str], file: Path | None = None) -> dict[str, Any]:
    """Read settings from a file and from KEY=VALUE pairs; a pair wins, and a dot leads into a section.

    Args:
        pairs: such as `epochs=3` or `method_config.epochs=3`; values are read as YAML.
        file: YAML or JSON with a mapping.

    Returns:
        The settings, unchecked.

    Raises:
        UsageError: the file holds something else, or a pair is none.
    """
    from salun_core.config import parse_text, read_document
    from salun_core.errors import UsageError

    settings = read_document(file) if file else {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file} holds no settings", f"it is a {type(settings).__name__}", "write `key: value` lines")
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair!r} is no setting", "it has the form KEY=VALUE", "write --set epochs=3")
        section = settings
        *outer, key = name.split(".")
        for part in outer:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {pair!r} does not fit", f"{part} is no section", "correct its name")
        section[key] = parse_text(value, f"--set {name}")
    return settings
