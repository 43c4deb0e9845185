"""`salun model list`, `show`, `diff`, `history` and `pull`: what the store has of a model line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import OptionalStore, Store
from salun_core.cli.output import byte_progress, echo, emit, emit_facts, in_order, minute, print_table

if TYPE_CHECKING:
    from salun_core.registry.differences import ModelDifference, Step
    from salun_core.registry.history import VersionSummary
    from salun_core.storage.s3 import S3Store
    from salun_core.sweeps.runs import RunLog

Reference = Annotated[
    str, typer.Argument(metavar="LINE[@VERSION]", help="The line, or a version by 6 or more digits. Default: HEAD.")
]
Side = Annotated[str, typer.Argument(metavar="LINE[@VERSION]|DIR", help="A version in the store, or a model folder.")]


def _runs(store: S3Store) -> RunLog:
    from salun_core.sweeps.runs import RunLog
    from salun_core.times import utc_clock

    return RunLog(store, utc_clock)


def _history(store: S3Store, line: str) -> list[VersionSummary]:
    from salun_core.registry.history import history as summarise
    from salun_core.sweeps.runs import RunStatus

    runs = _runs(store)
    return list(summarise(store, line, runs.request_count, lambda run: runs.status(run) is RunStatus.PUBLISHED))


def list_lines(store: Store) -> None:
    """List the model lines of the store.

    For each line it shows the current version, the number of versions, the size, and what was forgotten.
    """
    from salun_core.registry.lookup import lines
    from salun_core.storage import open_store

    opened = open_store(store)
    found = {line: _history(opened, line) for line in lines(opened)}

    def show() -> None:
        if not found:
            echo("no model line: import or train a model with --line, see salun model import --help")
            return
        columns = ["line", "HEAD", "made by", "published", "versions", "size", "forgotten", "debt"]
        rows: list[tuple[object, ...]] = []
        for line, versions in found.items():
            head = _head(versions)
            manifest = head.version.manifest
            erased, runs = manifest.lineage.forgotten_since_training, manifest.lineage.runs_since_training
            forgotten = f"{erased} in {_count(runs, 'run')}" if runs else "-"
            facts = (line, head.version.digest[:12], manifest.method, minute(manifest.created_at), len(versions))
            rows.append((*facts, _size(head.size), forgotten, _debt(head)))
        print_table(columns, rows)

    emit([_line(line, versions) for line, versions in found.items()], show)


def _head(versions: list[VersionSummary]) -> VersionSummary:
    return next(item for item in versions if item.state == "HEAD")


def _line(line: str, versions: list[VersionSummary]) -> dict[str, object]:
    return {"line": line, "versions": len(versions), "head": _document(_head(versions))}


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _debt(item: VersionSummary) -> str:
    return f"{item.version.manifest.lineage.debt:.1%}" + (" !" if item.alarm else "")


def history(line: Annotated[str, typer.Argument(metavar="LINE", help="The model line.")], store: Store) -> None:
    """List the versions of a model line, newest first.

    For each version it shows what was erased, the debt, holds and rollbacks.
    """
    from salun_core.storage import open_store

    versions = _history(open_store(store), line)

    def show() -> None:
        head = ["version", "made by", "requests", "forgotten", "debt", "runs", "weights", "held by", "published"]
        print_table(head, [_row(item) for item in versions])
        undone = [item for item in versions if item.state == "undone"]
        if undone:
            echo()
        for item in undone:
            echo(f"undone: {item.version.digest[:12]}, {_undoing(item)}")
        if _head(versions).alarm:
            echo("\nRetraining recommended: much was forgotten since the last full training.")

    emit([_document(item) for item in versions], show)


def _document(item: VersionSummary) -> dict[str, object]:
    manifest = item.version.manifest.model_dump(mode="json", exclude={"format"})
    undone = item.undone.model_dump(mode="json", include={"to", "by", "at", "reason"}) if item.undone else None
    facts = {"requests": item.requests, "weights": item.kept, "held_by": item.held_by, "alarm": item.alarm}
    return {"version": item.version.digest, "state": item.state, "undone": undone, **manifest, **facts}


def _undoing(item: VersionSummary) -> str:
    """Return who undid a version, when and why."""
    record = item.undone
    if record is None:
        return "by a rollback of which the reason was not recorded"
    return f"{minute(record.at)} by {record.by}, back to {record.to[:12]}: {record.reason}"


def _row(item: VersionSummary) -> tuple[object, ...]:
    manifest = item.version.manifest
    return (
        item.version.digest[:12] + (" undone" if item.state == "undone" else ""),
        manifest.method,
        "-" if item.requests is None else item.requests,
        manifest.forget_count,
        _debt(item),
        manifest.lineage.runs_since_training,
        item.kept,
        item.held_by or "-",
        minute(manifest.created_at),
    )


def show(reference: Reference, store: Store) -> None:
    """Show the details of a version.

    It shows the origin, the erased samples, the metrics and the storage of the version.
    """
    import json

    from salun_core.errors import UsageError
    from salun_core.gate import DECISION
    from salun_core.registry.lookup import read_file, resolve
    from salun_core.steps.outcome import EVIDENCE
    from salun_core.storage import open_store

    opened = open_store(store)
    line, digest = resolve(opened, reference)
    found = next((item for item in _history(opened, line) if item.version.digest == digest), None)
    if found is None:
        raise UsageError(
            f"{line}@{digest[:12]} was never published",
            "a run staged it and ended before HEAD moved",
            f"choose a version of `salun model history {line}`",
        )
    manifest = found.version.manifest
    record = _runs(opened).read(manifest.run) if manifest.run else None
    shown = ("model.json", EVIDENCE, DECISION)
    files = {name: json.loads(read_file(opened, found.version, name)) for name in shown if name in manifest.files}
    card, evidence, decision = (files.get(name, {}) for name in shown)
    document = {
        **_document(found),
        "size": found.size,
        "card": {name: card.get(name) for name in ("task", "architecture", "classes", "channels", "height", "width")},
        "request_ids": [member.id for member in record.members] if record else [],
        "metrics": evidence.get("metrics", {}),
        "gate": {name: decision.get(name) for name in ("policy", "passed")} if decision else None,
    }
    emit(document, lambda: _show(found, document))


def _show(found: VersionSummary, document: dict[str, Any]) -> None:
    manifest, card, gate = found.version.manifest, document["card"], document["gate"]
    lineage, ids = manifest.lineage, document["request_ids"]
    pixels = f"{card['channels']} x {card['height']} x {card['width']}"
    state = f"undone {_undoing(found)}" if found.state == "undone" else found.state
    forgotten = _count(manifest.forget_count, "sample") if manifest.forget_count else "nothing"
    emit_facts(
        {
            "version": f"{manifest.line}@{found.version.digest}",
            "state": state,
            "model": f"{card['architecture']}, {len(card['classes'] or ())} classes, images {pixels}",
            "made by": manifest.method + (f" in run {manifest.run}" if manifest.run else ""),
            "made from": manifest.parent,
            "published": minute(manifest.created_at),
            "size": f"{_size(found.size)} in {len(manifest.files)} files, weights {found.kept}",
            "held by": found.held_by,
            "forgotten": forgotten + (f" for {', '.join(ids)}" if ids else ""),
            "debt": f"{_debt(found)} in {_count(lineage.runs_since_training, 'run')} since the last training",
            "gate": f"{'passed' if gate['passed'] else 'refused'} policy {gate['policy']}" if gate else None,
        }
    )
    rows = _metric_rows(document["metrics"])
    if rows:
        echo()
        print_table(["metric", "before", "after", "retrained", "n"], rows)


def _metric_rows(metrics: dict[str, dict[str, Any]]) -> list[tuple[object, ...]]:
    values = [(name, metrics[name]) for name in in_order(metrics)]
    return [(name, item["before"], item["after"], item.get("reference"), item["n"]) for name, item in values]


def diff(a: Side, b: Side, store: OptionalStore = None) -> None:
    """Compare two models by layer.

    For versions, it also shows the runs, requests and metrics between them.
    """
    from salun_core.registry.differences import compare
    from salun_core.storage import open_store

    def requests_of(run: str) -> list[str]:
        record = _runs(open_store(store)).read(run) if store else None
        return [member.id for member in record.members] if record else []

    found = compare(store, a, b, requests_of)
    emit(_difference(found), lambda: _show_difference(found))


def _difference(found: ModelDifference) -> dict[str, Any]:
    layers = [
        {"layer": item.name, "values": item.values, "changed": item.changed, "relative_change": item.distance}
        for item in found.layers
    ]
    steps = [
        {
            "version": step.version.digest,
            "only_in": step.side,
            "run": step.version.manifest.run,
            "forgotten": step.version.manifest.forget_count,
            "requests": step.requests,
            "metrics": step.metrics,
        }
        for step in found.steps
    ]
    counts = {"values": found.values, "changed": found.changed, "only_in_a": found.gone, "only_in_b": found.new}
    return {"a": found.a, "b": found.b, **counts, "layers": layers, "steps": steps}


def _show_difference(found: ModelDifference) -> None:
    changed = [item for item in found.layers if item.changed]
    if changed:
        rows = [(i.name, i.values, i.changed, f"{i.changed / i.values:.1%}", i.distance) for i in changed]
        print_table(["layer", "values", "changed", "share", "relative change"], rows)
        echo()
    share = found.changed / found.values if found.values else 0.0
    same = len(found.layers) - len(changed)
    echo(f"{found.changed} of {found.values} values differ ({share:.1%}); {_count(same, 'layer')} bit-identical")
    for names, side in ((found.gone, found.a), (found.new, found.b)):
        if names:
            echo(f"only in {side}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5)))
    for step in found.steps:
        _show_step(found, step)


def _show_step(found: ModelDifference, step: Step) -> None:
    manifest, side = step.version.manifest, found.a if step.side == "a" else found.b
    requests = ", ".join(step.requests) if step.requests else "no recorded request"
    echo(
        f"\nonly in {side}: {step.version.digest[:12]} by {manifest.method}, {minute(manifest.created_at)}; "
        f"{_count(manifest.forget_count, 'sample')} forgotten; {requests}"
    )
    rows = _metric_rows(step.metrics)
    if rows:
        print_table(["metric", "before", "after", "retrained", "n"], rows)


def pull(
    reference: Reference,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write the model to.")],
    store: Store,
) -> None:
    """Download a version and check every file. After an interruption, run the same command to continue."""
    from salun_core.registry.lookup import resolve
    from salun_core.registry.pull import pull as fetch
    from salun_core.storage import open_store

    opened = open_store(store)
    line, digest = resolve(opened, reference)
    with byte_progress(f"{line}@{digest[:12]}") as on_progress:
        done = fetch(opened, line, digest, out, on_progress)
    counts = {"fetched_files": done.fetched, "files_already_there": done.present, "bytes": done.size}
    emit_facts({"model": out, "line": line, "version": digest, **counts})


def export(
    reference: Annotated[
        str, typer.Argument(metavar="LINE[@VERSION]|DIR", help="A version in the store, or a model folder.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="torch, safetensors, onnx, torch-export, timm or diffusers.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write; a folder for timm and diffusers.")],
    store: OptionalStore = None,
) -> None:
    """Write a model for other programs.

    The file contains the preprocessing and the class names. Its outputs are compared with those of torch.
    """
    from salun_core.errors import UsageError
    from salun_core.models.export import export_model
    from salun_core.registry.lookup import resolve
    from salun_core.registry.versions import fetch_version
    from salun_core.storage import open_store
    from salun_core.storage.local_files import temporary_folder

    if Path(reference).is_dir():
        emit_facts({"exported": out, "model": reference, **export_model(Path(reference), to, out)})
        return
    if not store:
        raise UsageError(f"{reference!r} is not a folder", "a version needs a store", "give --store, or a model folder")
    opened = open_store(store)
    line, digest = resolve(opened, reference)
    with temporary_folder("salun-export-") as folder:
        fetch_version(opened, line, digest, folder / "model")
        done = export_model(folder / "model", to, out)
    emit_facts({"exported": out, "model": f"{line}@{digest}", **done})
