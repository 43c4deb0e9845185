"""`salun doctor`, `exporter` and `purge`: check an installation, monitor it, and clean it up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Data, OptionalStore, Store
from salun_core.cli.output import MODE, echo, emit, print_table
from salun_core.errors import SalunError

if TYPE_CHECKING:
    from salun_core.doctor import Check
    from salun_core.retention.purge import PurgeReport


def doctor(
    context: typer.Context,
    store: OptionalStore = None,
    line: Annotated[str, typer.Option("--line", help="The model line to check.")] = "",
    data: Data = None,
    policy: Annotated[str, typer.Option("--policy", help="The gate policy of the line.")] = "auto",
    extra_metrics: Annotated[str, typer.Option("--extra-metrics", help="Extra metrics that runs will measure.")] = "",
) -> None:
    """Check this machine, the settings and the store.

    The exit code is 1 if a requirement is missing. With a model line, it also checks HEAD, the data, the policy, the
    signing key, and for each kind of request whether such a request could be erased from the line and pass the policy.
    """
    from salun_core.doctor import Project, check_project, run_checks

    checks = [_settings(context), *run_checks(store, Path.cwd())]
    works = any(check.name == "store" and check.state == "ok" for check in checks)
    checks += check_project(store, Project(line, data or "", policy, extra_metrics), works)
    failed = [check.name for check in checks if check.state == "failed"]

    def show() -> None:
        print_table(["check", "state", "found"], [(item.name, item.state, item.detail) for item in checks])
        for item in checks:
            if item.remedy:
                echo(f"{item.name}: {item.remedy}")
        echo(f"\n{'failed: ' + ', '.join(failed) if failed else 'all requirements are met'}")

    emit([check.model_dump(mode="json") for check in checks], show)
    if failed:
        raise typer.Exit(1)


def _settings(context: typer.Context) -> Check:
    """Check the settings file; the other checks use what it gives."""
    from salun_core.cli.settings import NAME, find_settings
    from salun_core.doctor import Check

    try:
        found = find_settings(context.find_root().params.get("config"))
        variables = found.variables() if found else {}
    except SalunError as error:
        return Check(name="settings", state="failed", detail=f"{error.what}: {error.why}", remedy=error.remedy)
    if found is None:
        remedy = "`salun init` writes one, with defaults for the options of every command"
        return Check(name="settings", state="absent", detail=f"no {NAME} in this folder", remedy=remedy)
    given = [name for name in found.settings.model_fields_set if getattr(found.settings, name) is not None]
    detail = f"{found.path.resolve()}: {', '.join(sorted(given)) or 'empty'}"
    detail += f"; {len(variables)} variables" if variables else ""
    return Check(name="settings", state="ok", detail=detail)


def exporter(
    store: Store,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 9400,
    interval: Annotated[float, typer.Option(min=1, max=3600, metavar="SECONDS", help="Time between refreshes.")] = 15,
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and exit.")] = False,
) -> None:
    """Serve metrics of requests and models to Prometheus.

    The metrics are at /metrics, and a health check at /healthz. A scrape does not read the store.
    """
    from salun_core.requests.gauges import GaugeReader
    from salun_core.storage import open_store
    from salun_core.telemetry.exporter import Exporter, serving
    from salun_core.times import utc_clock

    exporter = Exporter(GaugeReader(open_store(store), utc_clock).take, interval)
    if once:
        exporter.refresh()
        rows = [{"metric": name, "labels": labels, "value": value} for name, labels, value in exporter.samples()]
        emit(rows, lambda: echo(exporter.text(), nl=False))
        return
    with serving(exporter, host, port) as url:
        emit({"url": url}, lambda: echo(f"serving {url}"))
        Event().wait()


def purge(
    store: Store,
    scratch_hours: Annotated[int, typer.Option(min=0, max=24, help="Age limit of settled runs' forget data.")] = 24,
    mask_days: Annotated[int, typer.Option(min=0, max=30, help="Age limit of masks.")] = 30,
    weights_days: Annotated[int, typer.Option(min=0, max=30, help="Age limit of superseded weights.")] = 30,
    outcome_days: Annotated[int, typer.Option(min=0, max=30, help="Age limit of outcomes of idle sweeps.")] = 7,
    every_hours: Annotated[
        int, typer.Option(min=0, max=24, help="Time between purges; deletes what exceeds a limit before the next one.")
    ] = 12,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the keys; delete none.")] = False,
) -> None:
    """Delete forget data, masks and superseded weights.

    It also deletes garbage, and adds the deletions to the certificates.
    """
    from salun_core.certificates.keys import find_signing_key
    from salun_core.retention.rules import RetentionRules
    from salun_core.steps.purge import purge_store

    rules = RetentionRules(
        scratch_hours=scratch_hours,
        mask_days=mask_days,
        weights_days=weights_days,
        outcome_days=outcome_days,
        every_hours=every_hours,
    )
    report = purge_store(store, rules, dry_run=dry_run, signer=find_signing_key())
    emit(_purge_document(report), lambda: _show_purge(report))


def _purge_document(report: PurgeReport) -> dict[str, Any]:
    planned, total = report.plan, report.total
    fields = ("kind", "keys", "size", "reason", "run", "line", "version", "request")
    return {
        "dry_run": report.dry_run,
        "disposals": [{name: getattr(item, name) for name in fields} for item in planned.deletions],
        "erased": {"keys": total.keys, "versions": total.versions, "bytes": total.bytes},
        "skipped": len(report.skipped),
        "damaged_lines": list(report.damaged),
        "addenda": list(report.addenda),
        "cached": report.cached,
        "held": list(planned.held),
        "shared": list(planned.shared),
        "unknown": list(planned.unknown),
    }


def _show_purge(report: PurgeReport) -> None:
    if report.dry_run:
        columns, rows = ["what", "key", "bytes", "reason"], _each_key(report)
    else:
        columns, rows = ["what", "count", "keys", "bytes", "first reason"], _by_kind(report)
    if rows:
        print_table(columns, rows)
    else:
        echo("nothing to delete")
    if report.dry_run:
        echo("dry run: nothing was deleted")
    for text, count in _remaining(report):
        if count:
            echo(f"{text}: {count}")
    for key in report.plan.unknown if MODE.debug else ():
        echo(f"  {key}")


def _each_key(report: PurgeReport) -> list[tuple[object, ...]]:
    return [
        (item.kind, key, item.size if number == 0 else "", item.reason if number == 0 else "")
        for item in report.plan.deletions
        for number, key in enumerate(item.keys or ("-",))
    ]


def _by_kind(report: PurgeReport) -> list[tuple[object, ...]]:
    rows: dict[str, tuple[str, int, int, int, str]] = {}
    for item, removed in report.erased:
        kind, count, keys, size, reason = rows.get(item.kind, (item.kind, 0, 0, 0, item.reason))
        rows[item.kind] = (kind, count + 1, keys + removed.keys, size + removed.bytes, reason)
    return list(rows.values())


def _remaining(report: PurgeReport) -> Iterator[tuple[str, int]]:
    planned = report.plan
    yield "certificates that got an addendum", len(report.addenda)
    yield "blocks of the data that were deleted from SALUN_DATA_CACHE", report.cached
    yield "left for the next purge because a model line changed or was at work", len(report.skipped)
    yield "model lines whose HEAD lacks files, so that superseded weights stay", len(report.damaged)
    yield "superseded and held", len(planned.held)
    yield "superseded, with the weights of a version that stays", len(planned.shared)
    yield "unknown keys, not deleted", len(planned.unknown)
