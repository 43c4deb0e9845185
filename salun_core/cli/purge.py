"""`salun purge`, `salun model hold`, `salun model release`: what is forgotten for good, and what is kept from that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Actor, Store, named_store, who
from salun_core.cli.output import MODE, emit, emit_facts, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from salun_core.retention.purge import PurgeReport

_Version = Annotated[
    str, typer.Argument(metavar="LINE@VERSION", help="The version, by 6 or more digits of its digest.")
]


def purge(
    store: Store = None,
    pipeline_root: Annotated[
        str | None,
        typer.Option(
            "--pipeline-root",
            envvar="SALUN_PIPELINE_ROOT",
            help="Where Kubeflow keeps the files of the runs, such as s3://mlpipeline/v2/artifacts.",
        ),
    ] = None,
    scratch_hours: Annotated[
        int, typer.Option("--scratch-hours", min=0, max=24, help="Keep forget data of settled runs so long.")
    ] = 24,
    mask_days: Annotated[int, typer.Option("--mask-days", min=0, max=30, help="Keep masks so long.")] = 30,
    weights_days: Annotated[
        int, typer.Option("--weights-days", min=0, max=30, help="Keep superseded weights so long.")
    ] = 30,
    artifact_days: Annotated[
        int, typer.Option("--artifact-days", min=0, max=30, help="Keep Kubeflow's own copies so long.")
    ] = 7,
    every_hours: Annotated[
        int, typer.Option("--every-hours", min=0, max=24, help="How often purge runs: it looks ahead so far.")
    ] = 12,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List each key that would go, and touch nothing.")] = False,
) -> None:
    """Dispose of forget data, masks, superseded weights and what nothing needs, and add it to the certificates."""
    from salun_core.certificates.keys import find_signing_key
    from salun_core.retention import purge as step
    from salun_core.retention.rules import RetentionRules

    rules = RetentionRules(
        scratch_hours=scratch_hours,
        mask_days=mask_days,
        weights_days=weights_days,
        artifact_days=artifact_days,
        every_hours=every_hours,
    )
    report = step.purge(named_store(store), rules, pipeline_root, dry_run=dry_run, signer=find_signing_key())
    emit(_document(report), lambda: _show(report))


def hold(
    version: _Version,
    reason: Annotated[str, typer.Option("--reason", help="Why; no personal data.")],
    store: Store = None,
    actor: Actor = "",
) -> None:
    """Keep the weights of a version from being purged, until it is released."""
    from salun_core.registry.holds import hold_version
    from salun_core.registry.versions import resolve
    from salun_core.storage import open_store
    from salun_core.times import utc_clock

    opened = open_store(named_store(store))
    line, digest = resolve(opened, version)
    held = hold_version(opened, line, digest, who(actor), reason, utc_clock)
    emit_facts({"held": f"{line}@{digest}", "by": held.by, "since": held.at, "reason": held.reason})


def release(version: _Version, store: Store = None) -> None:
    """Give up the hold of a version: the next purge treats it like any other."""
    from salun_core.registry.holds import release_version
    from salun_core.registry.versions import resolve
    from salun_core.storage import open_store

    opened = open_store(named_store(store))
    line, digest = resolve(opened, version)
    held = release_version(opened, line, digest)
    emit_facts({"released": f"{line}@{digest}", "was_held_by": held.by, "since": held.at, "reason": held.reason})


def _document(report: PurgeReport) -> dict[str, Any]:
    planned, total = report.plan, report.total
    fields = ("kind", "keys", "size", "reason", "run", "line", "version", "request")
    return {
        "dry_run": report.dry_run,
        "disposals": [{name: getattr(item, name) for name in fields} for item in planned.disposals],
        "erased": {"keys": total.keys, "versions": total.versions, "bytes": total.bytes},
        "skipped": len(report.skipped),
        "addenda": list(report.addenda),
        "held": list(planned.held),
        "shared": list(planned.shared),
        "unknown": list(planned.unknown),
        "foreign_runs": planned.foreign_runs,
    }


def _show(report: PurgeReport) -> None:
    if report.dry_run:
        _print(["what", "key", "bytes", "reason"], _each_key(report), "nothing must go")
        typer.echo("dry run: nothing was touched")
    else:
        _print(["what", "count", "keys", "bytes", "first reason"], _by_kind(report), "nothing had to go")
    for text, count in _left(report):
        if count:
            typer.echo(f"{text}: {count}")


def _print(columns: list[str], rows: list[tuple[object, ...]], none: str) -> None:
    if rows:
        print_table(columns, rows)
    else:
        typer.echo(none)


def _each_key(report: PurgeReport) -> list[tuple[object, ...]]:
    return [
        (item.kind, key, item.size if number == 0 else "", item.reason if number == 0 else "")
        for item in report.plan.disposals
        for number, key in enumerate(item.keys or ("-",))
    ]


def _by_kind(report: PurgeReport) -> list[tuple[object, ...]]:
    rows: dict[str, tuple[str, int, int, int, str]] = {}
    for item, removed in report.erased:
        kind, count, keys, size, reason = rows.get(item.kind, (item.kind, 0, 0, 0, item.reason))
        rows[item.kind] = (kind, count + 1, keys + removed.keys, size + removed.bytes, reason)
    return list(rows.values())


def _left(report: PurgeReport) -> Iterable[tuple[str, int]]:
    planned = report.plan
    yield "certificates that got an addendum", len(report.addenda)
    yield "left for the next purge, a model line moved meanwhile", len(report.skipped)
    yield "superseded and held", len(planned.held)
    yield "superseded, and the weights are those of a version that stays", len(planned.shared)
    yield "keys that are not ours, left alone", len(planned.unknown)
    yield "runs under the pipeline root that are not ours, left alone", planned.foreign_runs
    if MODE.debug:
        for key in planned.unknown:
            typer.echo(f"  {key}")
