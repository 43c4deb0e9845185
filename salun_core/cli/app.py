"""The `salun` command: its verbs, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from salun_core import __version__
from salun_core.cli import (
    bench,
    demo,
    demo_diffusion,
    doctor,
    exporter,
    generation_models,
    judging,
    listing,
    models,
    purge,
    request,
    sweep,
    unlearning,
    verify,
)
from salun_core.cli import models as lines
from salun_core.cli import sweep as running
from salun_core.cli.examples import EXAMPLES
from salun_core.cli.failures import interruptible, reported
from salun_core.cli.output import MODE, quiet_logs

_EVERYWHERE = (
    ("--json", "Print one JSON document and nothing else on standard output."),
    ("--debug", "Print tracebacks and logs."),
)


class Verb(TyperCommand):
    """A verb whose help shows the options of every verb, and its example as it was typed."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the verb; the logs are set up here, because that takes a while and help needs none."""
        quiet_logs()
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - click's, which typer hides
        """Add the options that may stand anywhere."""
        super().format_options(ctx, formatter)
        with formatter.section("Everywhere"):
            formatter.write_dl(_EVERYWHERE)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the example without folding its lines."""
        if self.epilog:
            formatter.write(f"\n{self.epilog.strip()}\n")


class Root(TyperGroup):
    """The command itself: `--json` and `--debug` may stand anywhere, and every failure is one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Take the options of every verb from wherever they stand."""
        return super().parse_args(ctx, list(_hoisted(args)))

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the verb and report what it raises."""
        with reported():
            return super().invoke(ctx)


def _hoisted(args: Sequence[str]) -> Iterator[str]:
    """Yield the arguments with `--json` and `--debug` first, wherever before a `--` they stood."""
    end = args.index("--") if "--" in args else len(args)
    found = [name for name, _ in _EVERYWHERE if name in args[:end]]
    yield from found
    yield from (word for place, word in enumerate(args) if place >= end or word not in found)


app = typer.Typer(
    cls=Root,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    help="Make trained models forget, prove it, and publish only what passes the gate.",
)
_model = typer.Typer(no_args_is_help=True, help="Import models, and show the history of a model line.")
_train = typer.Typer(
    cls=generation_models.TrainGroup,
    no_args_is_help=True,
    help="Train a model from fresh weights: a classifier, unless another kind is named.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"salun {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    json: Annotated[bool, typer.Option("--json", help=_EVERYWHERE[0][1])] = False,
    debug: Annotated[bool, typer.Option("--debug", help=_EVERYWHERE[1][1])] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    MODE.json, MODE.debug = json, debug


def _add(group: typer.Typer, prefix: str, verbs: Mapping[str, Callable[..., None]]) -> None:
    for name, function in verbs.items():
        group.command(name, cls=Verb, epilog=EXAMPLES[prefix + name])(function)


_add(app, "", {"doctor": doctor.doctor, "demo": demo.demo, "demo-diffusion": demo_diffusion.demo_diffusion})
_add(_train, "train ", {"classifier": models.train, "ddpm": generation_models.train_ddpm})
_add(_train, "train ", {"stable-diffusion": generation_models.train_stable_diffusion})
_add(app, "", {"mask": unlearning.mask})
_add(app, "", {"unlearn": unlearning.unlearn, "evaluate": unlearning.evaluate, "gate": judging.gate})
_add(app, "", {"report": judging.report, "run": running.run})
_add(app, "", {"exporter": exporter.exporter})
_add(app, "", {"sweep": sweep.sweep})
_add(bench.app, "bench ", {"run": bench.run, "render": bench.render})
_add(app, "", {"verify": verify.verify, "certificate": verify.certificate})
_add(verify.key_app, "key ", {"create": verify.create_key})
_add(app, "", {"purge": purge.purge})
_add(_model, "model ", {"hold": purge.hold, "release": purge.release})
_add(_model, "model ", {"import-diffusers": generation_models.import_diffusion})
_add(_model, "model ", {"import": models.import_, "history": lines.history, "rollback": lines.rollback})
_add(listing.app, "ls ", {"methods": listing.methods, "models": listing.models, "data": listing.data})
for _command in request.app.registered_commands:
    _command.cls = Verb
app.add_typer(bench.app, name="bench")
app.add_typer(_model, name="model")
app.add_typer(_train, name="train")
app.add_typer(listing.app, name="ls")
app.add_typer(request.app, name="request")
app.add_typer(verify.key_app, name="key")


def main() -> None:
    """Run the command line; SIGTERM ends it as Ctrl-C does, so that nothing it started stays behind."""
    with interruptible():
        app(prog_name="salun")
