"""`salun request`: file deletion requests, show their state, and change it by hand."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Actor, DryRun, who
from salun_core.cli.output import emit, print_table
from salun_core.errors import ConflictError, UsageError
from salun_core.requests.schema import (
    DeletionRequest,
    Receipt,
    RequestEvent,
    RequestState,
    Status,
    is_overdue,
    status_after,
    summarise,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from salun_core.requests.intake import Filed
    from salun_core.requests.ledger import Ledger
    from salun_core.requests.schema import RequestEvent, Submission


_ALL_SHOWN = 20


def status_of(events: Sequence[RequestEvent]) -> Status:
    """Return where a request stands after all its events."""
    return status_after(events[-1] if events else None)


def as_document(
    request: DeletionRequest, events: Sequence[RequestEvent], now: datetime, with_target: bool
) -> dict[str, Any]:
    """Return a request as plain data; what it names is only summarised unless asked for."""
    status = status_of(events)
    document = request.model_dump(mode="json", exclude_none=True)
    if not with_target:
        document["target"] = {"kind": request.target.kind, "summary": summarise(request.target)}
    return {
        "request": document,
        "status": status.value,
        "overdue": is_overdue(request, status, now),
        "events": [event.model_dump(mode="json", exclude_none=True) for event in events],
    }


def as_row(state: RequestState, now: datetime) -> dict[str, Any]:
    """Return a line of the list as plain data, without what the request names."""
    request, last = state.request, state.last
    return {
        "id": request.id,
        "model_line": request.model_line,
        "status": state.status.value,
        "outcome": last.outcome.value if last and last.outcome else None,
        "received_at": request.received_at,
        "due_at": request.due_at,
        "overdue": is_overdue(request, state.status, now),
        "attempt": last.attempt if last else 1,
        "kind": request.target.kind,
        "summary": summarise(request.target),
    }


def print_receipts(receipts: Sequence[Receipt], dry_run: bool) -> None:
    """Print receipts as a table; of many only the last, and their number."""
    shown = receipts if len(receipts) <= _ALL_SHOWN else receipts[-3:]
    rows = [(item.id, item.model_line, _minute(item.received_at), _minute(item.due_at)) for item in shown]
    if rows:
        print_table(("id", "line", "received", "due"), rows)
    if len(shown) < len(receipts):
        typer.echo(f"{len(receipts)} requests {'would be ' if dry_run else ''}filed; the last are shown")
    if dry_run:
        typer.echo("dry run: nothing was written")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the lines of the list as a table."""
    if not rows:
        typer.echo("no requests")
        return
    cells = [
        (
            row["id"],
            row["model_line"],
            f"{row['status']}, overdue" if row["overdue"] else row["status"],
            _minute(row["due_at"]),
            row["attempt"],
            row["summary"],
        )
        for row in rows
    ]
    print_table(("id", "line", "status", "due", "try", "names"), cells)


def print_request(request: DeletionRequest, events: Sequence[RequestEvent], overdue: bool, with_target: bool) -> None:
    """Print a request and its moves."""
    status = f"{status_of(events)}, overdue" if overdue else status_of(events).value
    source = f", from {request.source}" if request.source else ""
    names = f"{request.model_line}, {summarise(request.target)}{source}"
    typer.echo(f"{request.id}: {status}, due {_minute(request.due_at)}, {names}")
    if with_target:
        typer.echo(request.target.model_dump_json(exclude_none=True, indent=2))
    rows = [
        (
            event.n,
            _minute(event.at),
            event.from_status.value,
            f"{event.to_status}: {event.outcome}" if event.outcome else event.to_status.value,
            event.attempt,
            event.actor,
            event.reason,
        )
        for event in events
    ]
    if rows:
        print_table(("n", "at", "from", "to", "try", "actor", "reason"), rows)


def print_move(event: RequestEvent, dry_run: bool) -> None:
    """Print a move in a line."""
    note = "dry run, nothing was written" if dry_run else f"event {event.n}"
    typer.echo(f"{event.request}: {event.from_status} -> {event.to_status} ({note})")


def _minute(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")


app = typer.Typer(no_args_is_help=True, help="File deletion requests, see where they stand, and move them.")

_Store = Annotated[
    str, typer.Option("--store", envvar="SALUN_STORE_URI", help="Where the requests are kept: s3://bucket/prefix.")
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The request's id.")]
_Reason = Annotated[str, typer.Option("--reason", help="Why, for the audit log; no personal data.")]

_EXAMPLE_SUBMIT = """Example:

  $ salun request submit --id r-1 --line faces --samples img-17,img-40
  id    line    received           due
  r-1   faces   2026-01-31 09:00   2026-02-28 09:00"""
_EXAMPLE_SHOW = """Example:

  $ salun request show r-1
  r-1: queued, due 2026-02-28 09:00, faces, 2 samples
  n   at                 from       to       try   actor   reason
  1   2026-01-31 09:00   received   queued   1     ana     submitted"""
_EXAMPLE_REINDEX = """Example:

  $ salun request reindex
  index entries put or deleted: 2"""
_EXAMPLE_LIST = """Example:

  $ salun request list --status queued --due-before 2026-03-01
  id    line    status   due                try   names
  r-1   faces   queued   2026-02-28 09:00   1     2 samples"""


def _example(verb: str, source: str, to: str, reason: str, number: int) -> str:
    return f'Example:\n\n  $ salun request {verb} r-1 --reason "{reason}"\n  r-1: {source} -> {to} (event {number})'


@app.command(epilog=_EXAMPLE_SUBMIT)
def submit(
    store: _Store,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="JSON, YAML, JSON lines or OpenDSR, of one or many; - is stdin."),
    ] = None,
    request_id: Annotated[str | None, typer.Option("--id", help="The request's id, in place of a file.")] = None,
    line: Annotated[
        str | None, typer.Option("--line", help="The model line to erase from; with a file of OpenDSR too.")
    ] = None,
    samples: Annotated[str | None, typer.Option("--samples", help="Sample ids to forget, with commas.")] = None,
    class_id: Annotated[str | None, typer.Option("--class", help="Class to forget: its number or name.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Subject reference to forget.")] = None,
    received_at: Annotated[
        str | None, typer.Option("--received-at", help="When the person asked (ISO 8601); now unless given.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Where it came from, such as a ticket; no personal data.")
    ] = None,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """File deletion requests. Filing the same again is harmless; another text under the same id is refused."""
    from salun_core.requests.intake import read_submissions

    flags = {
        "id": request_id,
        "model_line": line,
        "target": _target(samples, class_id, subject),
        "received_at": received_at,
        "source": source,
    }
    given = {
        name: value for name, value in flags.items() if value is not None and (file is None or name != "model_line")
    }
    if (file is None) == (not given):
        raise UsageError(
            "give either a file or the request's own flags",
            "both were given" if given else "neither was given",
            "see salun request submit --help",
        )
    submissions = [_from_flags(given)] if file is None else read_submissions(_read(file), file, line)
    filed = _file_all(_ledger(store, dry_run), submissions, who(actor))
    _print_filed(filed, dry_run)


def _target(samples: str | None, class_id: str | None, subject: str | None) -> dict[str, Any] | None:
    targets: list[dict[str, Any]] = []
    if samples is not None:
        targets.append({"kind": "samples", "ids": [part.strip() for part in samples.split(",") if part.strip()]})
    if class_id is not None:
        targets.append({"kind": "class", "class_id": int(class_id) if class_id.isdecimal() else class_id})
    if subject is not None:
        targets.append({"kind": "subject", "subject_ref": subject})
    if len(targets) > 1:
        raise UsageError(
            "a request names one thing",
            "--samples, --class and --subject were given together",
            "file a request for each",
        )
    return targets[0] if targets else None


def _from_flags(given: dict[str, Any]) -> Submission:
    from salun_core.config import parse
    from salun_core.requests.schema import Submission
    from salun_core.times import parse_moment

    if "received_at" in given:
        given = {**given, "received_at": parse_moment(given["received_at"])}
    return parse(Submission, given, "the request")


def _read(file: str) -> str:
    from salun_core.config import MAX_DOCUMENT_BYTES

    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_DOCUMENT_BYTES + 1)
        else:
            with Path(file).open("rb") as handle:
                data = handle.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise UsageError(f"{file} is too large", f"over {MAX_DOCUMENT_BYTES} bytes", "file it in parts")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}", str(error), "check the path, its permissions and encoding") from error


def _file_all(ledger: Ledger, submissions: Sequence[Submission], actor: str) -> Filed:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from salun_core.requests.intake import submit_all

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal and len(submissions) > 1
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("filing requests", total=len(submissions))
        return submit_all(ledger, submissions, actor, lambda: bar.advance(task))


def _print_filed(filed: Filed, dry_run: bool) -> None:
    from salun_core.cli import request as views

    documents = [receipt.model_dump(mode="json") for receipt in filed.receipts]
    emit(documents, lambda: views.print_receipts(filed.receipts, dry_run))
    total = len(filed.receipts) + len(filed.refused)
    if len(filed.refused) == 1 == total:
        raise filed.refused[0]
    if filed.refused:
        raise ConflictError(
            f"{len(filed.refused)} of {total} requests were refused",
            "; ".join(f"{error.what}: {error.why}" for error in filed.refused[:5]),
            "the others are filed; correct these and file them again",
        )


@app.command(epilog=_EXAMPLE_SHOW)
def show(
    request_id: _Id,
    store: _Store,
    target: Annotated[bool, typer.Option("--target", help="Print in full what it names: personal data.")] = False,
) -> None:
    """Show a request, where it stands, and all its moves. Ids, prompts and subjects stay hidden without --target."""
    from salun_core.cli import request as views
    from salun_core.times import utc_clock

    ledger = _ledger(store)
    request, events = ledger.get(request_id), ledger.events(request_id)
    document = views.as_document(request, events, utc_clock(), target)
    emit(document, lambda: views.print_request(request, events, document["overdue"], target))


@app.command("list", epilog=_EXAMPLE_LIST)
def list_requests(
    store: _Store,
    line: Annotated[str | None, typer.Option("--line", help="Only those of this model line.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="Only those that stand there, such as queued.")] = None,
    due_before: Annotated[
        str | None, typer.Option("--due-before", help="Only those due before this date or time (ISO 8601).")
    ] = None,
) -> None:
    """List requests, those due first at the head."""
    from salun_core.cli import request as views
    from salun_core.errors import unknown_name
    from salun_core.requests.schema import Status
    from salun_core.times import parse_moment, utc_clock

    if status is not None and status not in set(Status):
        raise unknown_name("status", status, [known.value for known in Status])
    limit = parse_moment(due_before) if due_before is not None else None
    states = _ledger(store).list(line, Status(status) if status else None, limit)
    rows = [views.as_row(state, utc_clock()) for state in states]
    emit(rows, lambda: views.print_rows(rows))


@app.command(epilog=_EXAMPLE_REINDEX)
def reindex(store: _Store, dry_run: DryRun = False) -> None:
    """Compare the index of where requests stand with all of them, and mend it: after a restored backup."""
    changed = _ledger(store, dry_run).reindex()
    note = " (dry run, nothing was written)" if dry_run else ""
    emit({"changed": changed}, lambda: typer.echo(f"index entries put or deleted: {changed}{note}"))


@app.command(epilog=_example("hold", "queued", "on_hold", "identity in doubt", 2))
def hold(request_id: _Id, store: _Store, reason: _Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
    """Keep a request from being erased. Its month goes on."""
    _print_move(_ledger(store, dry_run).hold(request_id, who(actor), reason), dry_run)


@app.command(epilog=_example("release", "on_hold", "queued", "identity confirmed", 3))
def release(request_id: _Id, store: _Store, reason: _Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
    """Queue a request that is on hold."""
    _print_move(_ledger(store, dry_run).release(request_id, who(actor), reason), dry_run)


@app.command(epilog=_example("cancel", "queued", "cancelled", "withdrawn", 2))
def cancel(request_id: _Id, store: _Store, reason: _Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
    """Withdraw a request that no run has taken up."""
    _print_move(_ledger(store, dry_run).cancel(request_id, who(actor), reason), dry_run)


@app.command(epilog=_example("retry", "failed", "queued", "data set repaired", 4))
def retry(request_id: _Id, store: _Store, reason: _Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
    """Queue a failed request again, with its attempts counted anew."""
    _print_move(_ledger(store, dry_run).retry(request_id, who(actor), reason), dry_run)


@app.command(epilog=_example("reopen", "completed", "queued", "model rolled back", 4))
def reopen(request_id: _Id, store: _Store, reason: _Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
    """Queue a completed request again, for a rollback past its erasure undid it."""
    _print_move(_ledger(store, dry_run).reopen(request_id, who(actor), reason), dry_run)


def _print_move(event: RequestEvent, dry_run: bool) -> None:
    from salun_core.cli import request as views

    emit(event.model_dump(mode="json", exclude_none=True), lambda: views.print_move(event, dry_run))


def _ledger(store: str, dry_run: bool = False) -> Ledger:
    from salun_core.requests.ledger import Ledger
    from salun_core.storage import open_store
    from salun_core.times import utc_clock

    return Ledger(open_store(store), utc_clock, dry_run)
