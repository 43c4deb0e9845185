"""`salun model history` and `salun model rollback`: the story of a model line, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import Actor, DryRun, Store, named_store, who
from salun_core.cli.output import emit, emit_facts, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from salun_core.steps.lineage import Chapter


def history(
    line: Annotated[str, typer.Argument(metavar="LINE", help="The model line.")],
    store: Store = None,
) -> None:
    """Show the versions of a model line, the newest first: what each erased, how it is kept, who holds it, its debt."""
    from salun_core.steps.lineage import tell
    from salun_core.storage import open_store

    chapters = tell(open_store(named_store(store)), line)
    emit([_document(item) for item in chapters], lambda: _print(chapters))


def _document(item: Chapter) -> dict[str, object]:
    manifest = item.version.manifest.model_dump(mode="json", exclude={"format"})
    facts = {"requests": item.requests, "weights": item.kept, "held_by": item.held_by, "alarm": item.alarm}
    return {"version": item.version.digest, **manifest, **facts}


def _print(chapters: Sequence[Chapter]) -> None:
    head = ["version", "made by", "requests", "forgotten", "debt", "runs", "weights", "held by", "published"]
    print_table(head, [_row(item) for item in chapters])
    if chapters and chapters[0].alarm:
        typer.echo("\nMuch was forgotten since the last full training: a new one is due.")


def _row(item: Chapter) -> tuple[object, ...]:
    manifest = item.version.manifest
    return (
        item.version.digest[:12],
        manifest.method,
        "-" if item.requests is None else item.requests,
        manifest.forget_count,
        f"{manifest.lineage.debt:.1%}" + (" !" if item.alarm else ""),
        manifest.lineage.runs_since_training,
        item.kept,
        item.held_by or "-",
        manifest.created_at[:16].replace("T", " "),
    )


def rollback(
    version: Annotated[str, typer.Argument(metavar="LINE@VERSION", help="The version to go back to.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log; no personal data.")],
    store: Store = None,
    reopen: Annotated[
        bool, typer.Option("--reopen", help="Queue the deletion requests again that it undoes; else it is refused.")
    ] = False,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """Make an earlier version HEAD again. Past an erasure it is refused, unless its requests are to be reopened."""
    from salun_core.steps.rollback import rollback as step

    done = step(named_store(store), version, who(actor), reason, reopen=reopen, dry_run=dry_run)
    emit_facts(
        {
            "head": done.head.version if done.head else "as before (dry run)",
            "undone_versions": len(done.undone),
            "reopened_requests": len(done.reopened),
        }
    )
