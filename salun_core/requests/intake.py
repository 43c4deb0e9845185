"""Intake of deletion requests: reads our own documents and those of OpenDSR 2.0, and files many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from salun_core.config import parse, parse_text
from salun_core.errors import ConflictError, SalunError, UsageError
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Receipt, Submission

_WRITERS = 16
_SHOWN = 5  # faults in one message
_CUSTOMER = "controller_customer_id"


def read_submissions(
    text: str, source: str, line: str | None = None, fallback: str | None = None
) -> Sequence[Submission]:
    """Read requests from JSON, YAML (one, or a list) or JSON lines; each is one of ours, or one of OpenDSR.

    `line` is the model line of OpenDSR requests, which name none; other requests are refused then. `fallback` is their
    line if `line` is None; other requests name theirs. A UsageError counts the faulty entries and describes the first.
    """
    entries = _entries(text, source)
    found: list[Submission] = []
    faults: list[UsageError] = []
    for where, entry in entries:
        try:
            found.append(_read(entry, where, line, fallback))
        except UsageError as error:
            faults.append(error)
    if len(entries) == 1 and faults:
        raise faults[0]
    if faults:
        some = "; ".join(f"{fault.what}: {fault.why}" for fault in faults[:_SHOWN])
        raise UsageError(
            f"{len(faults)} of {len(entries)} requests have faults", some, "correct them; nothing was filed"
        )
    seen: dict[str, Submission] = {}
    for submission in found:
        if seen.setdefault(submission.id, submission) != submission:
            raise UsageError(
                f"{source} has two requests {submission.id!r}", "their content differs", "give each its own id"
            )
    return found


def _entries(text: str, source: str) -> list[tuple[str, Any]]:
    """Return the requests in a document, each with its place for messages."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for _, line in lines):
        return [(f"{source}:{number}", parse_text(line, f"{source}:{number}")) for number, line in lines]
    document = parse_text(text, source)
    if not isinstance(document, list):
        return [(source, document)]
    if not document:
        raise UsageError(f"{source} is empty", "its list has no requests", "give at least one")
    return [(f"{source}[{number}]", entry) for number, entry in enumerate(document)]


def _read(entry: Any, where: str, line: str | None, fallback: str | None) -> Submission:  # noqa: ANN401
    if isinstance(entry, dict) and {"subject_request_id", "subject_request_type"} & entry.keys():
        return _read_opendsr(entry, line or fallback, where)
    if line is not None:
        raise UsageError(
            f"{where} is not an OpenDSR request", "only these get their model line from outside", "omit --line"
        )
    return parse(Submission, entry, where)


def _explicit_time(moment: object) -> object:
    if not isinstance(moment, str | datetime):
        raise ValueError("a time is text in RFC 3339, such as 2026-01-31T12:00:00Z")
    return moment


class _Foreign(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SubjectIdentity(_Foreign):
    """One name of the person (section 5.3)."""

    identity_type: str = Field(min_length=1, max_length=128)
    identity_value: str = Field(min_length=1, max_length=256)
    identity_format: str = Field(min_length=1, max_length=32)


class OpenDsrRequest(_Foreign):
    """A request of the specification (section 7.1.1); `regulation` is absent before version 2.0."""

    subject_request_id: UUID
    subject_request_type: str = Field(min_length=1, max_length=64)
    submitted_time: Annotated[AwareDatetime, BeforeValidator(_explicit_time)]
    subject_identities: list[SubjectIdentity] = Field(default=[], max_length=100)
    regulation: str | None = Field(default=None, max_length=64)
    api_version: str | None = Field(default=None, pattern=r"^[12](\.[0-9]{1,3}){0,2}$")


def _read_opendsr(document: dict[str, Any], line: str | None, source: str) -> Submission:
    """Read an erasure request of OpenDSR; its identity becomes the subject reference.

    If there are several identities, it takes the controller's own, `controller_customer_id`.
    """
    request = parse(OpenDsrRequest, document, source)
    if request.subject_request_type != "erasure":
        raise UsageError(
            f"{source} does not ask for erasure",
            f"its `subject_request_type` is {request.subject_request_type!r}, and a model can only forget",
            "handle that request elsewhere",
        )
    if line is None:
        raise UsageError(f"{source} names no model line", "OpenDSR has no field for it", "give --line")
    identities = request.subject_identities
    if not identities:
        raise UsageError(
            f"{source} names nobody",
            "`subject_identities` is empty, and identities in `extensions` are not read",
            f"send one identity of type {_CUSTOMER}",
        )
    chosen = [identity for identity in identities if identity.identity_type == _CUSTOMER]
    if len(identities) > 1 and len(chosen) != 1:
        raise UsageError(
            f"{source} names the person in {len(identities)} ways",
            f"{len(chosen)} of them are of type {_CUSTOMER}, so it is unclear which one the data use",
            f"send exactly one identity of type {_CUSTOMER}",
        )
    identity = (chosen or identities)[0]
    if identity.identity_format != "raw":
        raise UsageError(
            f"{source} names the person by a hash",
            f"`identity_format` is {identity.identity_format!r}, and the data hold plain references",
            "send the identity as raw",
        )
    fields = {
        "id": str(request.subject_request_id),
        "model_line": line,
        "target": {"kind": "subject", "subject_ref": identity.identity_value},
        "received_at": request.submitted_time,
        "source": "opendsr",
    }
    return parse(Submission, fields, source)


@dataclass(frozen=True)
class Filed:
    """The result of filing many requests: a receipt for each that was accepted, an error for each that was refused."""

    receipts: Sequence[Receipt]
    refused: Sequence[SalunError]


def submit_all(
    ledger: Ledger, submissions: Sequence[Submission], actor: str, done: Callable[[], None] = lambda: None
) -> Filed:
    """File many requests at once; one that is refused does not stop the others.

    Receipts and refusals keep the order of the submissions. After a StoreError, filing all of them again is harmless.
    """

    def file(item: Submission) -> Receipt:
        return ledger.submit(item.id, item.model_line, item.target, item.received_at, item.source, actor)

    receipts: list[Receipt] = []
    refused: list[SalunError] = []
    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            for future in [pool.submit(file, submission) for submission in submissions]:
                try:
                    receipts.append(future.result())
                except (ConflictError, UsageError) as error:
                    refused.append(error)
                done()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return Filed(receipts, refused)
