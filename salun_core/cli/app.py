"""The `salun` command: its verbs, and the behaviour that all of them share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from salun_core import __version__
from salun_core.cli import (
    audit,
    certificates,
    listing,
    models,
    operations,
    plugins,
    requests,
    runs,
    settings,
    steps,
    versions,
)
from salun_core.cli.failures import interruptible, reported
from salun_core.cli.output import MODE, bars, echo, progress, silence_logs
from salun_core.cli.verbs import UNPARSED, WITHOUT_SETTINGS, added_verbs
from salun_core.errors import EXIT_CODES, SalunError

_EVERYWHERE = (
    ("--json", "Print one JSON document and nothing else on standard output."),
    ("--debug", "Print tracebacks and SalUn's log lines."),
)
_CONFIG = ("--config", "Settings file. Default: salun.yaml in the working folder, if it exists.")
_ADDED_GROUPS, _ADDED = added_verbs()
_NO_SETTINGS = {"init", *(verb.split()[0] for verb, function in _ADDED.items() if function in WITHOUT_SETTINGS)}
_OTHER_NAMES = {("request", "status"): "show"}
_HELP = "salun.help"  # whether help is asked for, which must work with a faulty settings file
_EXAMPLE = re.compile(r"^## (?P<verb>.+)\n\n```console\n(?P<lines>(?:.*\n)+?)```$", re.MULTILINE)


@cache
def load_examples() -> dict[str, str]:
    """Return the example of each verb. The files are read when a help is shown: examples.md next to each module."""
    modules = {__file__, *(inspect.getfile(function) for function in _ADDED.values())}
    texts = [path.read_text(encoding="utf-8") for path in {Path(name).with_name("examples.md") for name in modules}]
    return {found["verb"]: found["lines"].rstrip() for text in texts for found in _EXAMPLE.finditer(text)}


class Verb(TyperCommand):
    """A verb whose help ends with the options of every verb and an example; `epilog` is the verb's full name."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - click's, which typer hides
        """Run the verb. Logs are set up here and not earlier: it takes a while, and help needs no logs."""
        silence_logs()
        with bars():
            return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Add the options that every verb has."""
        super().format_options(ctx, formatter)
        config = () if _has_config(self) else ((f"{_CONFIG[0]} FILE", _CONFIG[1]),)
        with formatter.section("Everywhere"):
            formatter.write_dl((*_EVERYWHERE, *config))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the example without folding its lines."""
        lines = load_examples()[self.epilog or ""].splitlines()
        formatter.write("\nExample:\n\n" + "\n".join(f"  {line}".rstrip() for line in lines) + "\n")


def _has_config(command: Any) -> bool:  # noqa: ANN401
    """Whether a verb has a `--config` of its own, which is not the settings file."""
    return any(_CONFIG[0] in parameter.opts for parameter in command.params)


class Root(TyperGroup):
    """The command itself: `--json`, `--debug` and `--config` may stand anywhere; failures are reported in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Move the options that every verb has to the front, and replace second names."""
        words = list(args)
        for (group, other), name in _OTHER_NAMES.items():
            if other in words[1:6] and words[words.index(other) - 1] == group:
                words[words.index(other)] = name
        ctx.meta[_HELP] = "--help" in words
        return super().parse_args(ctx, _hoisted(words, self._settings_places(words)))

    def _settings_places(self, words: Sequence[str]) -> list[int]:
        """Return the places of `--config FILE` and `--config=FILE` that mean the settings file.

        `run` and `unlearn` have a `--config` of their own: for these, only what stands before the verb counts.
        """
        command: Any = self
        found: list[int] = []
        for place, word in enumerate(words):
            if word == "--":
                break
            if place - 1 in found and words[place - 1] == _CONFIG[0]:
                found.append(place)
            elif word.partition("=")[0] == _CONFIG[0]:
                if command is self or not _has_config(command):
                    found.append(place)
            else:
                command = getattr(command, "commands", {}).get(word, command)
        return found

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Add the exit codes of every verb."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the verb and report its exception."""
        with reported():
            return super().invoke(ctx)


def _hoisted(words: Sequence[str], settings: Sequence[int]) -> list[str]:
    """Return the words with those for every verb first, unless they stand after a `--`.

    `settings` are places of the words that name the settings file.
    """
    end = words.index("--") if "--" in words else len(words)
    flags = [name for name, _ in _EVERYWHERE if name in words[:end]]
    rest = [word for place, word in enumerate(words) if place not in settings and (place >= end or word not in flags)]
    return [*flags, *(words[place] for place in settings), *rest]


app = typer.Typer(
    cls=Root,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Make trained models forget, measure the result, and publish only what passes the gate.",
)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"salun {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(_CONFIG[0], metavar="FILE", envvar=settings.CONFIG_VARIABLE, help=_CONFIG[1])
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=_EVERYWHERE[0][1])] = False,
    debug: Annotated[bool, typer.Option("--debug", help=_EVERYWHERE[1][1])] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    MODE.json, MODE.debug = json, debug
    if not context.meta.get(_HELP) and context.invoked_subcommand not in _NO_SETTINGS:
        _apply_settings(context, config)


def _apply_settings(context: typer.Context, config: Path | None) -> None:
    """Make the settings file the default of all options. `doctor` reports a faulty file itself, as a failed check."""
    try:
        found = settings.find_settings(config)
        if found is None:
            return
        settings.set_variables(found.variables())
        context.default_map = found.default_map(context.command)
    except SalunError:
        if context.invoked_subcommand != "doctor":
            raise
        return
    if MODE.debug:
        progress(f"settings: {found.path.resolve()}")


_GROUPS: dict[str, tuple[type[TyperGroup], str]] = {
    "model": (TyperGroup, "Import models, and manage the versions of a model line."),
    "train": (models.TrainGroup, "Train a classifier, or a small diffusion model."),
    "ls": (TyperGroup, "List the names of methods, models and data."),
    "plugin": (TyperGroup, "List the plug-ins of other packages, and check them."),
    "request": (TyperGroup, "File, show and change deletion requests."),
    "key": (TyperGroup, "Create the keys that sign and verify certificates."),
    **{name: (kind, inspect.getdoc(kind) or "") for name, kind in _ADDED_GROUPS.items()},
}
_VERBS: dict[str, Callable[..., None]] = {
    "init": settings.init,
    "doctor": operations.doctor,
    "mask": steps.mask,
    "unlearn": steps.unlearn,
    "evaluate": steps.evaluate,
    "gate": steps.gate,
    "report": steps.report,
    "run": runs.run,
    "exporter": operations.exporter,
    "sweep": runs.sweep,
    "verify": certificates.verify,
    "certificate": certificates.certificate,
    "audit": audit.audit,
    "purge": operations.purge,
    "model hold": models.hold,
    "model release": models.release,
    "model import": models.import_model,
    "model list": versions.list_lines,
    "model show": versions.show,
    "model diff": versions.diff,
    "model export": versions.export,
    "model pull": versions.pull,
    "model history": versions.history,
    "model rollback": models.rollback,
    "train classifier": models.train_classifier,
    "ls methods": listing.methods,
    "ls models": listing.models,
    "ls data": listing.data,
    "plugin list": plugins.list_plugins,
    "request submit": requests.submit,
    "request show": requests.show,
    "request list": requests.list_requests,
    "request reindex": requests.reindex,
    "request hold": requests.hold,
    "request release": requests.release,
    "request cancel": requests.cancel,
    "request retry": requests.retry,
    "request reopen": requests.reopen,
    "key create": certificates.create_key,
    **_ADDED,
}
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _add_verbs() -> None:
    groups = {"": app}
    for name, (kind, about) in _GROUPS.items():
        groups[name] = typer.Typer(cls=kind, no_args_is_help=True, help=about)
        app.add_typer(groups[name], name=name)
    for verb, function in _VERBS.items():
        group, _, name = verb.rpartition(" ")
        if group not in groups:  # its class could not be loaded
            app.add_typer(groups.setdefault(group, typer.Typer()), name=group)
        free = _FREE if function in UNPARSED else None
        groups[group].command(name, cls=Verb, epilog=verb, context_settings=free)(function)


_add_verbs()


def main() -> None:
    """Run the command line. SIGTERM ends it like Ctrl-C, so that its child processes end as well."""
    with interruptible():
        app(prog_name="salun")
