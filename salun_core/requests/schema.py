"""The documents of a deletion request: the request, its events, and the statuses that the events lead through.

Statuses and names follow OpenDSR 2.0 and the Data Rights Protocol. "Overdue" is derived from the clock, not a status.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from salun_core.config import Document
from salun_core.data.targets import ConceptTarget, ForgetTarget, RedactedTarget, Target
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.gate import Assurance, Cause
from salun_core.storage.documents import Digest, LineId, RunId, ShortText, Text, UtcTime
from salun_core.times import as_utc

RequestId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class StoredDocument(Document):
    """A document of the ledger, stored as canonical JSON."""

    def canonical(self) -> bytes:
        """Return the bytes that are stored and digested."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


class Status(StrEnum):
    """The status of a request."""

    RECEIVED = "received"
    REJECTED = "rejected"
    ON_HOLD = "on_hold"
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Outcome(StrEnum):
    """How a completed request was met."""

    UNLEARNED = "unlearned"
    RETRAINED = "retrained"
    NOTHING_TO_ERASE = "nothing_to_erase"


class Review(StrEnum):
    """Why a sweep holds a request for a person to review."""

    UNMATCHED = "unmatched"
    """The data do not have all that it names."""
    AMBIGUOUS = "ambiguous"
    """It names a class by a value that is the name of one class and the index of another."""
    TOO_FEW_SAMPLES = "too_few_samples"
    """The gate refused it since its batch has too few samples; no recipe changes that."""
    NOT_MEASURED = "not_measured"
    """The gate refused it since the evidence lacks what a rule needs; no recipe changes that."""
    INTEGRITY = "integrity"
    """The gate refused it since files and evidence do not fit together; no recipe changes that."""


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.RECEIVED: frozenset({Status.REJECTED, Status.ON_HOLD, Status.QUEUED, Status.CANCELLED}),
    Status.REJECTED: frozenset(),
    Status.ON_HOLD: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.ON_HOLD, Status.IN_PROGRESS, Status.FAILED, Status.CANCELLED}),
    Status.IN_PROGRESS: frozenset({Status.COMPLETED, Status.QUEUED, Status.FAILED}),
    Status.COMPLETED: frozenset({Status.QUEUED}),
    Status.FAILED: frozenset({Status.QUEUED}),
    Status.CANCELLED: frozenset(),
}
"""Each status and the statuses that may follow it."""

SETTLED = frozenset({Status.REJECTED, Status.COMPLETED, Status.CANCELLED})
"""Statuses that need no more work; a failed request needs a person."""


class Submission(Document):
    """A request as it is filed, before it has a deadline."""

    id: RequestId = Field(description="chosen by the filing party; filing the same id again is harmless")
    model_line: LineId = Field(description="the model line to erase from")
    target: ForgetTarget = Field(description="what is to be forgotten")
    received_at: AwareDatetime | None = Field(default=None, description="when the person asked; now unless given")
    source: ShortText | None = Field(default=None, description="where it came from; no personal data")

    @model_validator(mode="after")
    def _names_something(self) -> Submission:
        if isinstance(self.target, RedactedTarget):
            raise ValueError("a redacted target names nothing: file the original target")
        return self


class DeletionRequest(StoredDocument):
    """A stored request. The only change to it is the redaction of its target once it is settled."""

    format: Literal["salun.request/v1"] = "salun.request/v1"
    id: RequestId = Field(description="the request's id")
    model_line: LineId = Field(description="the model line to erase from")
    target: ForgetTarget = Field(description="what is to be forgotten")
    received_at: UtcTime = Field(description="when the person asked, ISO 8601 in UTC")
    due_at: UtcTime = Field(description="one calendar month later (GDPR Art. 12(3))")
    source: ShortText | None = Field(default=None, description="where it came from; no personal data")
    sha256: Digest | None = Field(default=None, description="SHA-256 of the request as it was filed; once redacted")

    @model_validator(mode="after")
    def _fits(self) -> DeletionRequest:
        if self.due <= self.received:
            raise ValueError("`due_at` is not after `received_at`")
        if (self.sha256 is not None) != isinstance(self.target, RedactedTarget):
            raise ValueError("`sha256` and a redacted target need each other")
        return self

    @property
    def received(self) -> datetime:
        """When the person asked, in UTC."""
        return datetime.fromisoformat(self.received_at)

    @property
    def due(self) -> datetime:
        """When it must be settled, in UTC."""
        return datetime.fromisoformat(self.due_at)

    @property
    def filed_sha256(self) -> str:
        """SHA-256 of the request as it was filed, before its redaction."""
        return self.sha256 or sha256_bytes(self.canonical())


class Tried(Document):
    """A recipe that the gate refused."""

    rung: Annotated[int, Field(ge=0, le=99, strict=True)] = Field(description="its escalation level")
    causes: list[Cause] = Field(description="why; empty if the decision is missing")


class RequestEvent(StoredDocument):
    """One transition of a request; all its events together are its audit log."""

    format: Literal["salun.event/v1"] = "salun.event/v1"
    request: RequestId = Field(description="the request")
    n: Annotated[int, Field(ge=1, le=999_999, strict=True)] = Field(description="number of the event, from 1")
    at: UtcTime = Field(description="when, ISO 8601 in UTC")
    actor: ShortText = Field(description="who made the transition: a person, or a service by name")
    from_status: Status = Field(description="the status before")
    to_status: Status = Field(description="the status after")
    reason: Text = Field(description="why; no personal data")
    attempt: Annotated[int, Field(ge=1, strict=True)] = Field(
        description="attempt from 1: one more after each return from a run, 1 again after a retry or reopening"
    )
    run: RunId | None = Field(default=None, description="the unlearning run that made the transition")
    outcome: Outcome | Review | None = Field(
        default=None, description="with `completed` how the request was met; with `on_hold` what a person must review"
    )
    assurance: Assurance | None = Field(default=None, description="with `completed` how sure the outcome is")
    epoch: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        default=None, description="epoch of the model line's lease that the run held"
    )
    known_only: Literal[True] | None = Field(
        default=None, description="a person decided to erase what the data have, and to leave out unknown names"
    )
    rung: Annotated[int, Field(ge=0, le=99, strict=True)] = Field(
        default=0,
        description="escalation level, from 0: number of the recipe that comes next; a refusal's cause decides which",
    )
    tried: list[Tried] | None = Field(
        default=None, description="refused recipes since a person queued the request; the cause decides what follows"
    )
    group: ShortText | None = Field(
        default=None,
        description="the half of a refused batch that the request belongs to; only this half shares its next run",
    )
    previous: Digest | None = Field(
        default=None, description="SHA-256 of the event before, so that a changed or missing event is noticed"
    )
    writer: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        description="random token of the call, so that two equal transitions have different bytes"
    )

    @model_validator(mode="after")
    def _fits(self) -> RequestEvent:
        if self.to_status not in TRANSITIONS[self.from_status]:
            raise ValueError(f"a request cannot move from {self.from_status} to {self.to_status}")
        if isinstance(self.outcome, Outcome) != (self.to_status is Status.COMPLETED):
            raise ValueError("the outcome of an erasure and the status completed need each other")
        if isinstance(self.outcome, Review) and self.to_status is not Status.ON_HOLD:
            raise ValueError("the outcome of a review needs the status on_hold")
        if (self.assurance is not None) != (self.to_status is Status.COMPLETED):
            raise ValueError("an assurance level and the status completed need each other")
        return self


class Receipt(Document):
    """The answer to a filed request; filing it again gives the same receipt."""

    id: RequestId = Field(description="the request's id")
    model_line: LineId = Field(description="the model line to erase from")
    received_at: UtcTime = Field(description="when the month began")
    due_at: UtcTime = Field(description="when it ends")
    sha256: Digest = Field(description="SHA-256 of the request as it was filed")

    @classmethod
    def of(cls, request: DeletionRequest) -> Receipt:
        """Return the receipt of a stored request."""
        fields = request.model_dump(include={"id", "model_line", "received_at", "due_at"})
        return cls(**fields, sha256=request.filed_sha256)


class RequestState(Document):
    """A request and its last event; None if it has no events yet."""

    request: DeletionRequest = Field(description="the request")
    last: RequestEvent | None = Field(default=None, description="its last event")

    @property
    def status(self) -> Status:
        """The status of the request."""
        return status_after(self.last)


def status_after(last: RequestEvent | None) -> Status:
    """Return the status of a request after its last event; None if it has no events yet."""
    return last.to_status if last else Status.RECEIVED


def is_overdue(request: DeletionRequest, status: Status, now: datetime) -> bool:
    """Return whether a request is past its month and not settled.

    A hold stops the erasure but not the month; a failed request is not settled.
    """
    return status not in SETTLED and as_utc(now) > request.due


def summarise(target: Target) -> str:
    """Describe what a target names, without sample ids, prompts or subject references: `2 samples`."""
    if isinstance(target, RedactedTarget):
        return f"{_summary(target.of, target.count, target.named)} (redacted)"
    names = target.prompts if isinstance(target, ConceptTarget) else getattr(target, "ids", None) or ()
    return _summary(target.kind, len(names), getattr(target, "named", None))


def _summary(kind: str, count: int, class_id: int | str | None) -> str:
    if kind == "class":
        return f"class {class_id}"
    if kind == "subject":
        return "1 subject"
    if kind == "random":
        return "a random share of the training data"
    noun = "prompt" if kind == "concept" else "sample"
    counted = f"{count} {noun}" if count == 1 else f"{count} {noun}s"
    if kind == "concept":
        return f"1 concept by {counted}"
    return counted if count else "samples of a manifest"
