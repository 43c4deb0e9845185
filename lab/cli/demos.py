"""`salun demo` and `demo-diffusion`: run the demos of a checkout."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from lab.checkout import load_example
from salun_core.cli.output import MODE
from salun_core.cli.verbs import unparsed, without_settings


@without_settings
@unparsed
def demo(context: typer.Context) -> None:
    """Run the whole process on small real images.

    It starts a store, trains a model, files deletion requests, runs two sweeps, and writes certificates and a report.
    This runs `python -m examples.demo` of the checkout and takes its options: see `salun demo --help`.
    """
    _run_demo(context.args)


@without_settings
@unparsed
def demo_diffusion(context: typer.Context) -> None:
    """Run the whole process on small diffusion models.

    It trains a small Stable Diffusion or DDPM, files a deletion request, runs a sweep, and writes images and a
    certificate. This runs `python -m examples.demo --diffusion` of the checkout and takes its options, such as `--kind
    ddpm`.
    """
    _run_demo(["--diffusion", *context.args])


def _run_demo(arguments: Sequence[str]) -> None:
    app = load_example("demo.__main__").app
    shared = [f"--{name}" for name in ("json", "debug") if getattr(MODE, name)]
    code = app([*arguments, *shared], prog_name="salun demo", standalone_mode=False)
    if code:
        raise typer.Exit(code)
