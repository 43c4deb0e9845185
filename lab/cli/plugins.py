"""`salun plugin check`: hold the plug-ins of other packages against the contract."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from salun_core.cli.output import emit, print_table
from salun_core.errors import SalunError


def check(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A package with plug-ins, the name of a plug-in, or package:object.")
    ],
) -> None:
    """Check a package, or one of its plug-ins, against the contract.

    This runs its code, even if SALUN_PLUGINS does not list it.
    """
    from lab.conformance import check_plugins

    found = check_plugins(name)
    rows = [asdict(one) for one in found]
    emit(rows, lambda: print_table(list(rows[0]), [list(row.values()) for row in rows]))
    if failed := [one for one in found if one.state == "fails"]:
        raise SalunError(
            f"{name} does not satisfy the contract",
            f"{len(failed)} of {len(found)} checks fail, the first one: {failed[0].plugin}, {failed[0].check}",
            "correct the code of the plug-in, and check it again",
        )
