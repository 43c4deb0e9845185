"""`salun plugin`: list the plug-ins of other packages, and check them against the contract."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from salun_core import plugins
from salun_core.cli.output import emit, print_table, progress
from salun_core.errors import SalunError


def list_plugins() -> None:
    """List the plug-ins of installed packages.

    It shows whether they may be loaded, and does not run their code.
    """
    from salun_core.contract import fault_of

    rows = []
    for offer in (offer for kind in plugins.GROUPS for offer in plugins.offers(kind)):
        state = fault_of(offer) or ("allowed" if plugins.is_allowed(offer) else "not allowed")
        try:
            digest = offer.record().digest
        except SalunError as error:
            digest, state = "", str(error)
        rows.append({**asdict(offer), "digest": digest, "state": state})
    columns = ["kind", "name", "object", "package", "sha256", "state"]
    cells = [
        [
            row["kind"],
            row["name"],
            row["target"],
            f"{row['distribution']} {row['version']}",
            row["digest"][:12],
            row["state"],
        ]
        for row in rows
    ]
    emit(rows, lambda: print_table(columns, cells) if rows else progress("no installed package offers a plug-in"))


def check(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A package with plug-ins, the name of a plug-in, or package:object.")
    ],
) -> None:
    """Check a package, or one of its plug-ins, against the contract.

    This runs its code, even if SALUN_PLUGINS does not list it.
    """
    from salun_core.contract import check_plugins

    found = check_plugins(name)
    rows = [asdict(one) for one in found]
    emit(rows, lambda: print_table(list(rows[0]), [list(row.values()) for row in rows]))
    if failed := [one for one in found if one.state == "fails"]:
        raise SalunError(
            f"{name} does not satisfy the contract",
            f"{len(failed)} of {len(found)} checks fail, the first one: {failed[0].plugin}, {failed[0].check}",
            "correct the code of the plug-in, and check it again",
        )
