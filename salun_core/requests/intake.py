"""Takes requests in from a document of one or many, and files them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from salun_core.config import parse, parse_text
from salun_core.errors import ConflictError, SalunError, UsageError
from salun_core.requests.ledger import Ledger
from salun_core.requests.opendsr import is_opendsr, read_opendsr
from salun_core.requests.schema import Receipt, Submission

_WRITERS = 16
_SHOWN = 5


@dataclass(frozen=True)
class Filed:
    """What became of many submissions: a receipt for each that was taken, an error for each that was refused."""

    receipts: Sequence[Receipt]
    refused: Sequence[SalunError]


def read_submissions(text: str, source: str, line: str | None = None) -> Sequence[Submission]:
    """Read requests from JSON, YAML (one, or a list) or JSON lines; each is one of ours, or one of OpenDSR.

    Args:
        text: the document.
        source: where it came from, for the message.
        line: the model line of the OpenDSR requests, which name none.

    Raises:
        UsageError: it is none of these, is empty, or an entry has faults; the faulty entries are counted, and the
            first of them described.
    """
    entries = _entries(text, source)
    found: list[Submission] = []
    faults: list[UsageError] = []
    for where, entry in entries:
        try:
            found.append(_read(entry, where, line))
        except UsageError as error:
            faults.append(error)
    if len(entries) == 1 and faults:
        raise faults[0]
    if faults:
        some = "; ".join(f"{fault.what}: {fault.why}" for fault in faults[:_SHOWN])
        raise UsageError(f"{len(faults)} of {len(entries)} requests have faults", some, "nothing was filed; correct it")
    _check_distinct(found, source)
    return found


def _read(entry: Any, where: str, line: str | None) -> Submission:  # noqa: ANN401 - any YAML or JSON value
    if is_opendsr(entry):
        return read_opendsr(entry, line, where)
    if line is not None:
        raise UsageError(
            f"{where} is no OpenDSR request", "only these get their model line from outside", "omit --line"
        )
    return parse(Submission, entry, where)


def _entries(text: str, source: str) -> list[tuple[str, Any]]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for _, line in lines):
        return [(f"{source}:{number}", parse_text(line, f"{source}:{number}")) for number, line in lines]
    document = parse_text(text, source)
    if not isinstance(document, list):
        return [(source, document)]
    if not document:
        raise UsageError(f"{source} is empty", "it is a list of no requests", "give at least one")
    return [(f"{source}[{number}]", entry) for number, entry in enumerate(document)]


def _check_distinct(submissions: Sequence[Submission], source: str) -> None:
    seen: dict[str, Submission] = {}
    for submission in submissions:
        if seen.setdefault(submission.id, submission) != submission:
            raise UsageError(
                f"{source} has two requests {submission.id!r}", "they say different things", "give each its own id"
            )


def submit_all(
    ledger: Ledger, submissions: Sequence[Submission], actor: str, done: Callable[[], None] = lambda: None
) -> Filed:
    """File many requests at once; one that is refused does not stop the others.

    Args:
        ledger: where to.
        submissions: the requests.
        actor: who files them.
        done: called after each.

    Returns:
        Receipts and refusals, each in the order of the submissions.

    Raises:
        StoreError: the store cannot be reached or refuses us; those not yet begun are left out, and filing all of
            them again is harmless.
    """

    def file(submission: Submission) -> Receipt:
        return ledger.submit(
            submission.id,
            submission.model_line,
            submission.target,
            submission.received_at,
            submission.source,
            actor,
        )

    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            return _gather([pool.submit(file, submission) for submission in submissions], done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _gather(futures: Sequence[Future[Receipt]], done: Callable[[], None]) -> Filed:
    receipts: list[Receipt] = []
    refused: list[SalunError] = []
    for future in futures:
        try:
            receipts.append(future.result())
        except (ConflictError, UsageError) as error:
            refused.append(error)
        done()
    return Filed(receipts, refused)
