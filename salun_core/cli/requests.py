"""`salun request`: file deletion requests, show their status, and change it by hand.

Modules of the core are imported in the verbs, so that the help needs neither pydantic nor boto3.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Actor, DryRun, Reason, Store, who
from salun_core.cli.output import emit, minute, print_table
from salun_core.errors import ConflictError, UsageError, unknown_name

if TYPE_CHECKING:
    from salun_core.requests.intake import Filed
    from salun_core.requests.ledger import Ledger
    from salun_core.requests.schema import DeletionRequest, Receipt, RequestEvent, RequestState, Submission

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the request.")]

_ALL_SHOWN = 20  # of more receipts than this only the last three are printed


def _ledger(store: str, dry_run: bool = False) -> Ledger:
    from salun_core.requests.ledger import Ledger
    from salun_core.storage import open_store
    from salun_core.times import utc_clock

    return Ledger(open_store(store), utc_clock, dry_run)


def submit(
    store: Store,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="JSON, YAML, JSON lines or OpenDSR; - is stdin.")
    ] = None,
    request_id: Annotated[str | None, typer.Option("--id", help="Id of the request, instead of a file.")] = None,
    line: Annotated[str | None, typer.Option(help="The model line to erase from; also with an OpenDSR file.")] = None,
    samples: Annotated[str | None, typer.Option(help="Ids of the samples to forget, separated by commas.")] = None,
    class_id: Annotated[str | None, typer.Option("--class", help="Class to forget: its name, or its index.")] = None,
    class_name: Annotated[str | None, typer.Option(help="Class to forget, by its name only.")] = None,
    class_index: Annotated[int | None, typer.Option(min=0, help="Class to forget, by its index only, from 0.")] = None,
    subject: Annotated[str | None, typer.Option(help="Reference of the person to forget.")] = None,
    received_at: Annotated[str | None, typer.Option(help="When the person asked (ISO 8601). Default: now.")] = None,
    source: Annotated[str | None, typer.Option(help="Its origin, such as a ticket. No personal data.")] = None,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """File deletion requests. Repeating a call has no effect; another text under the same id is refused."""
    from salun_core.config import parse
    from salun_core.requests.intake import read_submissions
    from salun_core.requests.schema import Submission
    from salun_core.times import parse_moment

    received = None if received_at is None else parse_moment(received_at)
    target = _target(samples, class_id, class_name, class_index, subject)
    flags = {"id": request_id, "target": target, "received_at": received, "source": source}
    flags |= {"model_line": line} if file is None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    if (file is None) == (not given):
        why = "both were given" if given else "neither was given"
        raise UsageError("give either a file or the options of one request", why, "see salun request submit --help")
    if file is None:
        submissions: Sequence[Submission] = [parse(Submission, given, "the request")]
    else:
        submissions = read_submissions(_read(file), file, line)
    _print_filed(_file_all(_ledger(store, dry_run), submissions, who(actor)), dry_run)


def _target(
    samples: str | None, class_id: str | None, class_name: str | None, class_index: int | None, subject: str | None
) -> dict[str, Any] | None:
    targets: list[dict[str, Any]] = []
    if samples is not None:
        targets.append({"kind": "samples", "ids": [part.strip() for part in samples.split(",") if part.strip()]})
    if class_id is not None:
        targets.append({"kind": "class", "class_id": _class_id(class_id)})
    if class_name is not None:
        targets.append({"kind": "class", "class_name": class_name})
    if class_index is not None:
        targets.append({"kind": "class", "class_index": class_index})
    if subject is not None:
        targets.append({"kind": "subject", "subject_ref": subject})
    if len(targets) > 1:
        why = "--samples, --class, --class-name, --class-index and --subject exclude each other"
        raise UsageError("a request has one target", why, "file a request for each")
    return targets[0] if targets else None


def _class_id(text: str) -> int | str:
    """Return a number as such, as earlier releases filed it; 00001 is a name."""
    return int(text) if text.isascii() and text.isdecimal() and str(int(text)) == text else text


def _read(file: str) -> str:
    from salun_core.config import MAX_DOCUMENT_BYTES

    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_DOCUMENT_BYTES + 1)
        else:
            with Path(file).open("rb") as handle:
                data = handle.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise UsageError(f"{file} is too large", f"it has over {MAX_DOCUMENT_BYTES} bytes", "file it in parts")
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
    documents = [receipt.model_dump(mode="json") for receipt in filed.receipts]
    emit(documents, lambda: _show_receipts(filed.receipts, dry_run))
    total = len(filed.receipts) + len(filed.refused)
    if len(filed.refused) == 1 == total:
        raise filed.refused[0]
    if filed.refused:
        raise ConflictError(
            f"{len(filed.refused)} of {total} requests were refused",
            "; ".join(f"{error.what}: {error.why}" for error in filed.refused[:5]),
            "the others are filed; correct these and file them again",
        )


def _show_receipts(receipts: Sequence[Receipt], dry_run: bool) -> None:
    shown = receipts if len(receipts) <= _ALL_SHOWN else receipts[-3:]
    rows = [(item.id, item.model_line, minute(item.received_at), minute(item.due_at)) for item in shown]
    if rows:
        print_table(("id", "line", "received", "due"), rows)
    if len(shown) < len(receipts):
        typer.echo(f"{len(receipts)} requests {'would be ' if dry_run else ''}filed; the last three are shown")
    if dry_run:
        typer.echo("dry run: nothing was written")


def show(
    request_id: Id,
    store: Store,
    target: Annotated[bool, typer.Option("--target", help="Print the target in full: personal data.")] = False,
) -> None:
    """Show the status of a request and its history. Ids, prompts and persons stay hidden without --target."""
    from salun_core.requests.schema import is_overdue, status_after, summarise
    from salun_core.times import utc_clock

    ledger = _ledger(store)
    request, events = ledger.get(request_id), ledger.events(request_id)
    last = events[-1] if events else None
    status, outcome = status_after(last), last.outcome.value if last and last.outcome else None
    overdue = is_overdue(request, status, utc_clock())
    document = request.model_dump(mode="json", exclude_none=True)
    if not target:
        document["target"] = {"kind": request.target.kind, "summary": summarise(request.target)}
    history = [event.model_dump(mode="json", exclude_none=True) for event in events]
    emit(
        {"request": document, "status": status.value, "outcome": outcome, "overdue": overdue, "events": history},
        lambda: _show_request(request, _standing(status, outcome, overdue), events, target),
    )


def _standing(status: str, outcome: str | None, overdue: bool) -> str:
    """Return where a request stands, in a few words: `completed: unlearned`, `on_hold: unmatched, overdue`."""
    return f"{status}{f': {outcome}' if outcome else ''}{', overdue' if overdue else ''}"


def _show_request(request: DeletionRequest, status: str, events: Sequence[RequestEvent], with_target: bool) -> None:
    from salun_core.requests.schema import summarise

    source = f", from {request.source}" if request.source else ""
    summary = f"{request.model_line}, {summarise(request.target)}{source}"
    typer.echo(f"{request.id}: {status}, due {minute(request.due_at)}, {summary}")
    if with_target:
        typer.echo(request.target.model_dump_json(exclude_none=True, indent=2))
    rows = [
        (
            event.n,
            minute(event.at),
            event.from_status.value,
            _standing(event.to_status, event.outcome, overdue=False),
            event.attempt,
            event.actor,
            event.reason,
        )
        for event in events
    ]
    if rows:
        print_table(("n", "at", "from", "to", "attempt", "actor", "reason"), rows)


def list_requests(
    store: Store,
    line: Annotated[str | None, typer.Option(help="Only those of this model line.")] = None,
    status: Annotated[str | None, typer.Option(help="Only those with this status, such as queued.")] = None,
    due_before: Annotated[str | None, typer.Option(help="Only those due before this time (ISO 8601).")] = None,
) -> None:
    """List requests, the earliest due date first."""
    from salun_core.requests.schema import Status
    from salun_core.times import parse_moment, utc_clock

    if status is not None and status not in set(Status):
        raise unknown_name("status", status, [known.value for known in Status])
    limit = parse_moment(due_before) if due_before is not None else None
    states = _ledger(store).list(line, [Status(status)] if status else list(Status), limit)
    rows = [_row(state, utc_clock()) for state in states]
    emit(rows, lambda: _show_rows(rows))


def _row(state: RequestState, now: datetime) -> dict[str, Any]:
    """Return a request as plain data, without its target."""
    from salun_core.requests.schema import is_overdue, summarise

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


def _show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        typer.echo("no requests")
        return
    cells = [
        (
            row["id"],
            row["model_line"],
            _standing(row["status"], row["outcome"], row["overdue"]),
            minute(row["due_at"]),
            row["attempt"],
            row["summary"],
        )
        for row in rows
    ]
    print_table(("id", "line", "status", "due", "attempt", "target"), cells)


def reindex(store: Store, dry_run: DryRun = False) -> None:
    """Compare the index of statuses with all requests and repair it, for example after restoring a backup."""
    changed = _ledger(store, dry_run).reindex()
    note = " (dry run, nothing was written)" if dry_run else ""
    emit({"changed": changed}, lambda: typer.echo(f"index entries put or deleted: {changed}{note}"))


def release(
    request_id: Id,
    store: Store,
    reason: Reason,
    known_only: Annotated[
        bool, typer.Option("--known-only", help="Erase what the data have, and leave out names that they do not have.")
    ] = False,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """Queue a request that is on hold, and say what then happens.

    A request that a sweep held for review is looked up again by the next sweep. If the data still do not have all that
    it names, it is held again, unless --known-only is given. One that names nothing that exists: cancel it.
    """
    from salun_core.requests.schema import Review

    ledger = _ledger(store, dry_run)
    last = ledger.state(request_id).last
    event = ledger.release(request_id, who(actor), reason, known_only)
    then = "the next sweep that claims it erases what it names"
    if known_only:
        then = "the next sweep erases what the data have of it; if nothing of that was trained on, it is held again"
    elif last is not None and last.outcome is Review.UNMATCHED:
        then = "the next sweep looks it up again, and holds it again if the data still lack a name; see --known-only"
    elif last is not None and last.outcome is Review.AMBIGUOUS:
        then = "it is held again while its class may be two: cancel it, and file it with --class-name or --class-index"
    document = {**event.model_dump(mode="json", exclude_none=True), "then": then}
    emit(document, lambda: typer.echo(f"{_moved(event, dry_run)}\n{then}"))


def _moved(event: RequestEvent, dry_run: bool) -> str:
    note = "dry run, nothing was written" if dry_run else f"event {event.n}"
    return f"{event.request}: {event.from_status} -> {event.to_status} ({note})"


def _transition(name: str, about: str) -> Callable[..., None]:
    """Return the verb that calls one of the ledger's transitions."""

    def verb(request_id: Id, store: Store, reason: Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
        event: RequestEvent = getattr(_ledger(store, dry_run), name)(request_id, who(actor), reason)
        emit(event.model_dump(mode="json", exclude_none=True), lambda: typer.echo(_moved(event, dry_run)))

    verb.__doc__ = about
    return verb


hold = _transition("hold", "Exclude a request from sweeps. Its due date stays.")
cancel = _transition("cancel", "Withdraw a request that no run has claimed.")
retry = _transition("retry", "Queue a failed request again, and count its attempts from one.")
reopen = _transition("reopen", "Queue a completed request again, after a rollback that undid its erasure.")
