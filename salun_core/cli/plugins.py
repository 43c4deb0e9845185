"""`salun plugin list`: the plug-ins of other packages."""

from __future__ import annotations

from dataclasses import asdict

from salun_core import plugins
from salun_core.cli.output import emit, print_table, progress
from salun_core.errors import SalunError
from salun_core.plugins import Kind, Offer


def list_plugins() -> None:
    """List the plug-ins of installed packages.

    It shows whether they may be loaded, and does not run their code.
    """
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


def shipped_names(kind: Kind) -> set[str]:
    """Return the names of what ships, which no plug-in can have."""
    from salun_core.evaluation.metrics import extra_metrics, metric_names
    from salun_core.methods import classification, diffusion
    from salun_core.models.architectures import CLASSIFIERS

    return {
        "method": {*classification.METHODS, *diffusion.METHODS},
        "metric": {*extra_metrics(), *metric_names()},
        "attack": {*extra_metrics(), *metric_names()},
        "architecture": set(CLASSIFIERS),
    }[kind]


def fault_of(offer: Offer) -> str:
    """Return why a plug-in cannot be reached by its name, without loading it; empty if it can."""
    if offer.name in shipped_names(offer.kind):
        return f"hidden: {offer.name} ships; rename the entry point"
    same = [other for other in plugins.offers(offer.kind) if other.name == offer.name and other != offer]
    if same:
        return f"ambiguous: {same[0].distribution} offers it, too; uninstall one of them"
    return "" if plugins.is_reference(offer.target) else f"{offer.target!r} is not package:object; correct it"
