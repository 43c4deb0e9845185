"""`salun request`: file deletion requests, show their status, and change it by hand.

Modules of the core are imported in the verbs, so that the help needs neither pydantic nor boto3.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.options import Actor, DryRun, Reason, Store, who
from salun_core.cli.output import MODE, echo, emit, minute, print_table
from salun_core.errors import ConflictError, UsageError, unknown_name

if TYPE_CHECKING:
    from salun_core.requests.filing import Match
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
    context: typer.Context,
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
    concept: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="Concept of a text-to-image model: a prompt, with --anchor; or a YAML or JSON file with prompts, "
            "anchor_prompt, images and neighbours.",
        ),
    ] = None,
    anchor: Annotated[str | None, typer.Option(help="What the model generates instead of the concept.")] = None,
    random: Annotated[float | None, typer.Option(metavar="FRACTION", help="Random share of the training data.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the random share. Default: 0.")] = None,
    received_at: Annotated[
        str | None, typer.Option(help="Time at which the person made the request (ISO 8601). Default: now.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Origin of the request, such as a ticket. No personal data.")
    ] = None,
    check_data: Annotated[
        bool | None,
        typer.Option(
            "--check-data/--no-check-data",
            help="Look the target up in the data. Default: only in data that need no download.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="Gate policy that the sweep will apply; also checks what this policy needs.")
    ] = "auto",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for a confirmation.")] = False,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """Check deletion requests and file them.

    It checks them against their model lines and shows what they match. In a terminal it asks for a confirmation, unless
    --yes or --json is given; in a script it does not. It refuses a line that does not exist, a target that does not fit
    the line, and another text under an existing id. Repeating a call has no effect.
    """
    from salun_core.config import parse
    from salun_core.requests.intake import read_submissions
    from salun_core.requests.schema import Submission
    from salun_core.times import parse_moment

    received = None if received_at is None else parse_moment(received_at)
    targets = {
        "--samples": samples is not None and {"kind": "samples", "ids": _split(samples)},
        "--class": class_id is not None and {"kind": "class", "class_id": _class_id(class_id)},
        "--class-name": class_name is not None and {"kind": "class", "class_name": class_name},
        "--class-index": class_index is not None and {"kind": "class", "class_index": class_index},
        "--subject": subject is not None and {"kind": "subject", "subject_ref": subject},
        "--concept": concept is not None and _concept(concept, anchor),
        "--random": random is not None and {"kind": "random", "fraction": random, "seed": seed or 0},
    }
    if random is not None and not 0 < random < 1:
        raise UsageError(
            f"--random {random:g} is not a share", "it must be above 0 and below 1", "give one such as --random 0.1"
        )
    for option, value, needed in (("--anchor", anchor, concept), ("--seed", seed, random)):
        if value is not None and needed is None:
            raise UsageError(
                f"{option} does not fit", "it belongs to another kind of target", "see salun request submit --help"
            )
    target = _only_target(targets)
    flags = {"id": request_id, "target": target, "received_at": received, "source": source}
    shared = context.get_parameter_source("line").name == "DEFAULT_MAP"  # type: ignore[union-attr]
    flags |= {"model_line": line} if file is None and not shared else {}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if (file is None) == (not given):
        why = "both were given" if given else "neither was given"
        raise UsageError("give either a file or the options of one request", why, "see salun request submit --help")
    if file is None:
        _check_complete(request_id, target)
        given |= {"model_line": line} if shared else {}
        submissions: Sequence[Submission] = [parse(Submission, given, "the request")]
    else:
        named, fallback = (None, line) if shared else (line, None)
        submissions = read_submissions(_read(file), file, named, fallback)
    filed, matches = _file_all(store, submissions, who(actor), check_data, policy, _confirmation(yes, dry_run), dry_run)
    _print_filed(filed, matches, dry_run)


def _check_complete(request_id: str | None, target: Mapping[str, Any] | None) -> None:
    """Refuse options that are no request in words of the command line, not in those of the document."""
    from salun_core.storage.keys import check_id

    if request_id is None:
        raise UsageError("the request has no id", "--id is not given", "give --id, such as --id r-1")
    check_id("request", request_id)
    if target is None:
        remedy = "give --class-name, --class-index, --samples, --subject, --concept or --random"
        raise UsageError(f"request {request_id} names nothing to forget", "no target is given", remedy)


def _split(samples: str) -> list[str]:
    return [part.strip() for part in samples.split(",") if part.strip()]


def _only_target(targets: Mapping[str, Any]) -> dict[str, Any] | None:
    given = [(option, target) for option, target in targets.items() if target]
    if len(given) > 1:
        why = f"{' and '.join(option for option, _ in given)} cannot be used together"
        raise UsageError("a request has one target", why, "file a request for each")
    return given[0][1] if given else None


def _concept(text: str, anchor: str | None) -> dict[str, Any]:
    """Return the target of a concept: from a file, or from one prompt and its anchor."""
    from salun_core.config import parse_text

    if not text.endswith((".yaml", ".yml", ".json")) and not Path(text).is_file():
        if anchor is None:
            why = "the prompts of a concept are answered with another one afterwards"
            raise UsageError(
                "a concept needs an anchor", why, 'give --anchor, such as --concept "a cat" --anchor "a dog"'
            )
        return {"kind": "concept", "prompts": [text], "anchor_prompt": anchor}
    found = parse_text(_read(text), text)
    if not isinstance(found, dict) or "prompts" not in found:
        raise UsageError(
            f"{text} is not a concept",
            "it has no `prompts`",
            'write {"prompts": ["a cat"], "anchor_prompt": "a dog", "images": 64, "neighbours": ["a lynx"]}',
        )
    return {"kind": "concept", **found, **({} if anchor is None else {"anchor_prompt": anchor})}


def _class_id(text: str) -> int | str:
    """Return a number as such; 00001 is a name."""
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


def _confirmation(yes: bool, dry_run: bool) -> Callable[[Sequence[Match]], bool]:
    """Return the function that shows what requests name, and asks on a terminal whether to file them."""

    def confirm(matches: Sequence[Match]) -> bool:
        if MODE.json:
            return True
        _show_matches(matches)
        if yes or dry_run or not (sys.stdin.isatty() and sys.stdout.isatty()):
            return True
        return typer.confirm(f"File {len(matches)} request{'s' if len(matches) > 1 else ''}?", err=True)

    return confirm


def _show_matches(matches: Sequence[Match]) -> None:
    from salun_core.requests.filing import counted

    if len(matches) <= _ALL_SHOWN:
        rows = [
            (item.id, item.model_line, _names(item), item.samples, item.in_training, item.subjects, _note(item))
            for item in matches
        ]
        print_table(("id", "line", "names", "samples", "in training", "subjects", "note"), rows)
    else:
        total = counted(matches)
        named = f"{total['samples']} samples, {total['in_training']} in training"
        echo(f"{len(matches)} requests name {named}")
        for name, text in (
            ("unknown", "name what the data do not have"),
            ("unchecked", "were not looked up in the data"),
        ):
            if total[name]:
                echo(f"{total[name]} requests {text}")
    for text in dict.fromkeys(warning for item in matches for warning in item.warnings):
        echo(f"warning: {text}")


def _names(item: Match) -> str:
    """Return what a request names: for a class its index and name."""
    return item.names if item.class_name is None else f"class {item.class_index}: {item.class_name}"


def _note(item: Match) -> str:
    if item.unchecked:
        return f"not looked up: {item.unchecked}"
    if item.unknown:
        return f"{item.unknown} not in the data: held for review"
    return "nothing to erase" if item.in_training == 0 else ""


def _file_all(
    store: str,
    submissions: Sequence[Submission],
    actor: str,
    check_data: bool | None,
    policy: str,
    confirm: Callable[[Sequence[Match]], bool],
    dry_run: bool,
) -> tuple[Filed, Sequence[Match]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from salun_core.requests.filing import file_requests
    from salun_core.storage import open_store
    from salun_core.times import utc_clock

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal and len(submissions) > 1
    bar = Progress(*columns, console=console, transient=True, disable=not shown)

    def confirmed(matches: Sequence[Match]) -> bool:
        if not confirm(matches):
            return False
        bar.start()  # not before the question
        return True

    task = bar.add_task("filing requests", total=len(submissions))
    try:
        return file_requests(
            open_store(store),
            submissions,
            actor,
            check_data=check_data,
            policy_uri=policy,
            confirm=confirmed,
            done=lambda: bar.advance(task),
            dry_run=dry_run,
            clock=utc_clock,
        )
    finally:
        bar.stop()


def _print_filed(filed: Filed, matches: Sequence[Match], dry_run: bool) -> None:
    of = {match.id: match.model_dump(mode="json", exclude={"id", "model_line"}) for match in matches}
    documents = [{**receipt.model_dump(mode="json"), "match": of[receipt.id]} for receipt in filed.receipts]
    total = len(filed.receipts) + len(filed.refused)
    if not total:
        echo("nothing was filed", err=True)
        raise typer.Exit(1)
    emit(documents, lambda: _show_receipts(filed.receipts, dry_run))
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
        echo(f"{len(receipts)} requests {'would be ' if dry_run else ''}filed; the last three are shown")
    if dry_run:
        echo("dry run: nothing was written")


def show(
    request_id: Id,
    store: Store,
    target: Annotated[bool, typer.Option("--target", help="Print the target in full: personal data.")] = False,
) -> None:
    """Show the status of a request and its history. Ids, prompts and persons stay hidden without --target."""
    from salun_core.requests.schema import Status, is_overdue, status_after, summarise
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
    facts = {"request": document, "status": status.value, "outcome": outcome, "overdue": overdue, "events": history}
    assurance = last.assurance if last else None
    facts["assurance"] = assurance.model_dump(mode="json", exclude_none=True) if assurance else None
    undone, then = _undone(store, request_id, status)
    if not undone and last is not None and last.run and status in {Status.QUEUED, Status.ON_HOLD, Status.FAILED}:
        then = last.reason  # of the run that returned it: why, and what comes next
    facts |= ({"undone": undone} if undone else {}) | ({"next": then} if then else {})

    def shown() -> None:
        _show_request(request, _standing(status, outcome, overdue), events, target)
        if assurance:
            echo(f"level {assurance.figures}\n{textwrap.fill(assurance.text, 100)}")
        if undone:
            echo(f"its erasure is undone: {undone}")
        if then:
            echo(f"next: {then}")

    emit(facts, shown)


def _undone(store: str, request_id: str, status: str) -> tuple[str, str]:
    """Return how the erasure of a completed request was undone by a rollback, and the command that queues it again."""
    from salun_core.certificates.verify import undoing_of
    from salun_core.errors import StoreError
    from salun_core.requests.schema import Status
    from salun_core.storage import open_store

    if status != Status.COMPLETED:
        return "", ""
    try:
        undone = undoing_of(open_store(store), request_id)
    except StoreError:  # these credentials may not read certificates
        return "", ""
    return undone, f'salun request reopen {request_id} --reason "..."' if undone else ""


def _standing(status: str, outcome: str | None, overdue: bool) -> str:
    """Return where a request stands, in a few words: `completed: unlearned`, `on_hold: unmatched, overdue`."""
    return f"{status}{f': {outcome}' if outcome else ''}{', overdue' if overdue else ''}"


def _show_request(request: DeletionRequest, status: str, events: Sequence[RequestEvent], with_target: bool) -> None:
    from salun_core.requests.schema import summarise

    source = f", from {request.source}" if request.source else ""
    summary = f"{request.model_line}, {summarise(request.target)}{source}"
    echo(f"{request.id}: {status}, due {minute(request.due_at)}, {summary}")
    if with_target:
        echo(request.target.model_dump_json(exclude_none=True, indent=2))
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
    """List requests, the earliest due date first. Completed ones that a rollback undid are marked."""
    from salun_core.requests.schema import Status
    from salun_core.times import parse_moment, utc_clock

    if status is not None and status not in set(Status):
        raise unknown_name("status", status, [known.value for known in Status])
    limit = parse_moment(due_before) if due_before is not None else None
    states = _ledger(store).list(line, [Status(status)] if status else list(Status), limit)
    undone = _undone_among(store, states)
    rows = [{**_row(state, utc_clock()), "undone": state.request.id in undone} for state in states]
    emit(rows, lambda: _show_rows(rows))


def _undone_among(store: str, states: Sequence[RequestState]) -> set[str]:
    """Return the completed requests whose erasure a rollback undid."""
    from salun_core.certificates.verify import undone_of
    from salun_core.errors import SalunError
    from salun_core.requests.schema import Status
    from salun_core.storage import open_store

    completed = [state.request for state in states if state.status is Status.COMPLETED]
    found: set[str] = set()
    for line in sorted({request.model_line for request in completed}):
        try:
            found.update(undone_of(open_store(store), line, [item.id for item in completed if item.model_line == line]))
        except SalunError as error:  # the list of statuses is right without the marks
            echo(f"warning: requests of {line} that a rollback undid are not marked: {error.what}", err=True)
    return found


def _row(state: RequestState, now: datetime) -> dict[str, Any]:
    """Return a request as plain data, without its target."""
    from salun_core.requests.schema import is_overdue, summarise

    request, last = state.request, state.last
    return {
        "id": request.id,
        "model_line": request.model_line,
        "status": state.status.value,
        "outcome": last.outcome.value if last and last.outcome else None,
        "level": last.assurance.level if last and last.assurance else None,
        "received_at": request.received_at,
        "due_at": request.due_at,
        "overdue": is_overdue(request, state.status, now),
        "attempt": last.attempt if last else 1,
        "kind": request.target.kind,
        "summary": summarise(request.target),
    }


def _show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        echo("no requests")
        return
    leveled = any(row["level"] for row in rows)
    cells = [
        (
            row["id"],
            row["model_line"],
            _standing(row["status"], row["outcome"], row["overdue"]) + (", undone" if row["undone"] else ""),
            *([row["level"] or ""] if leveled else []),
            minute(row["due_at"]),
            row["attempt"],
            row["summary"],
        )
        for row in rows
    ]
    print_table(("id", "line", "status", *(["level"] if leveled else []), "due", "attempt", "target"), cells)


def reindex(store: Store, dry_run: DryRun = False) -> None:
    """Repair the index of requests.

    It compares the index with the events of all requests. Use it after restoring a backup.
    """
    changed = _ledger(store, dry_run).reindex()
    note = " (dry run, nothing was written)" if dry_run else ""
    emit({"changed": changed}, lambda: echo(f"index entries put or deleted: {changed}{note}"))


def release(
    request_id: Id,
    store: Store,
    reason: Reason,
    known_only: Annotated[
        bool,
        typer.Option("--known-only", help="Erase the part of the target that is in the data, and ignore the rest."),
    ] = False,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """Queue a request that is on hold, and print what happens next.

    The next sweep looks up the target again. If the data still lack a part of it, the sweep holds the request again,
    unless --known-only is given. If nothing that the request names exists, cancel it.
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
    elif last is not None and last.outcome is Review.TOO_FEW_SAMPLES:
        then = "the next sweep tries the same recipe, and holds it again unless its batch is larger: --min-requests"
    elif last is not None and last.outcome in {Review.NOT_MEASURED, Review.INTEGRITY}:
        then = "the next sweep tries the same recipe; it is held again while the cause remains"
    document = {**event.model_dump(mode="json", exclude_none=True), "then": then}
    emit(document, lambda: echo(f"{_moved(event, dry_run)}\n{then}"))


def _moved(event: RequestEvent, dry_run: bool) -> str:
    note = "dry run, nothing was written" if dry_run else f"event {event.n}"
    return f"{event.request}: {event.from_status} -> {event.to_status} ({note})"


def _transition(name: str, about: str) -> Callable[..., None]:
    """Return the verb that calls one of the ledger's transitions."""

    def verb(request_id: Id, store: Store, reason: Reason, actor: Actor = "", dry_run: DryRun = False) -> None:
        event: RequestEvent = getattr(_ledger(store, dry_run), name)(request_id, who(actor), reason)
        emit(event.model_dump(mode="json", exclude_none=True), lambda: echo(_moved(event, dry_run)))

    verb.__doc__ = about
    return verb


hold = _transition("hold", "Exclude a request from sweeps. Its due date stays.")
cancel = _transition("cancel", "Withdraw a request that no run has claimed.")
retry = _transition("retry", "Queue a failed request again, and count its attempts from one.")
reopen = _transition("reopen", "Queue a completed request again after a rollback.")
