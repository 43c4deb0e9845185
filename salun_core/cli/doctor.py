"""`salun doctor`: is everything here that a run needs?"""

from __future__ import annotations

from pathlib import Path

import typer

from salun_core.cli.options import Store
from salun_core.cli.output import emit, print_table


def doctor(store: Store = None) -> None:
    """Check this machine, the store and the metrics gateway. Exit code 1 when something that a run needs fails."""
    from salun_core.doctor import run_checks

    checks = list(run_checks(store, Path.cwd()))
    failed = [check.name for check in checks if check.state == "failed"]

    def show() -> None:
        print_table(["check", "state", "found"], [(item.name, item.state, item.detail) for item in checks])
        for item in checks:
            if item.remedy:
                typer.echo(f"{item.name}: {item.remedy}")
        typer.echo(f"\n{'failed: ' + ', '.join(failed) if failed else 'everything that a run needs is here'}")

    emit([check.model_dump(mode="json") for check in checks], show)
    if failed:
        raise typer.Exit(1)
