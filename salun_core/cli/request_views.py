"""What `salun request` prints: plain data for programs, tables for people; neither says what a request names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import typer

from salun_core.cli.output import print_table
from salun_core.requests.deadlines import is_overdue
from salun_core.requests.schema import (
    DeletionRequest,
    Receipt,
    RequestEvent,
    RequestState,
    Status,
    status_after,
    summarise,
)

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
