"""The documents of a deletion request: the request, its events, and the states that the events lead through.

States and names follow OpenDSR 2.0 and the Data Rights Protocol; "overdue" is derived from the clock and never a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from salun_core.config import Document
from salun_core.data.forget_set import ClassTarget, ConceptTarget, ForgetTarget, RedactedTarget, SubjectTarget, Target
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.storage.documents import Digest, LineId, RunId, ShortText, Text, UtcTime
from salun_core.times import as_utc

RequestId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class Status(StrEnum):
    """Where a request stands."""

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
"""Each status and those that may follow it."""

SETTLED = frozenset({Status.REJECTED, Status.COMPLETED, Status.CANCELLED})
"""Nothing is owed any more; a failed request still is."""


def transition_allowed(source: Status, to: Status) -> bool:
    """Return whether a request may go from one status to another."""
    return to in TRANSITIONS[source]


class Submission(Document):
    """A request as it is handed in, before it has a deadline."""

    id: RequestId = Field(description="chosen by whoever files it; filing the same id again is harmless")
    model_line: LineId = Field(description="the model line to erase from")
    target: ForgetTarget = Field(description="what is to be forgotten")
    received_at: AwareDatetime | None = Field(default=None, description="when the person asked; now unless given")
    source: ShortText | None = Field(default=None, description="where it came from; no personal data")

    @model_validator(mode="after")
    def _names_something(self) -> Submission:
        if isinstance(self.target, RedactedTarget):
            raise ValueError("a redacted target names nothing any more: file what it named")
        return self


class DeletionRequest(Document):
    """A request as it is kept; once it is settled, what it names is redacted, and nothing else ever changes."""

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
            raise ValueError("`sha256` goes with a redacted target, and that needs it")
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
        """SHA-256 of the request as it was filed, before anything was redacted."""
        return self.sha256 or sha256_bytes(self.canonical())

    def canonical(self) -> bytes:
        """Return the bytes that are stored and digested."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


class RequestEvent(Document):
    """One move of a request; all events together are its audit log."""

    format: Literal["salun.event/v1"] = "salun.event/v1"
    request: RequestId = Field(description="the request that moved")
    n: Annotated[int, Field(ge=1, le=999_999, strict=True)] = Field(description="number of the event, from 1")
    at: UtcTime = Field(description="when, ISO 8601 in UTC")
    actor: ShortText = Field(description="who moved it: a person, or a service by name")
    from_status: Status = Field(description="the status before")
    to_status: Status = Field(description="the status after")
    reason: Text = Field(description="why; no personal data")
    attempt: Annotated[int, Field(ge=1, strict=True)] = Field(
        description="which try this is: one more with each return from a run, 1 again after a retry or reopening"
    )
    run: RunId | None = Field(default=None, description="the unlearning run that moved it")
    outcome: Outcome | None = Field(default=None, description="how it was met; with `completed` only")
    epoch: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        default=None, description="epoch of the model line's lease under which a run moved it"
    )
    rung: Annotated[int, Field(ge=0, le=99, strict=True)] = Field(
        default=0, description="which recipe of the ladder comes next, from 0; higher after each refusal"
    )
    group: ShortText | None = Field(
        default=None,
        description="the half of a refused batch that it belongs to; only its own half shares its next run",
    )
    previous: Digest | None = Field(
        default=None, description="SHA-256 of the event before, so that none can be changed or left out unseen"
    )
    writer: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        description="random token of the writing call: two equal moves are still two"
    )

    @model_validator(mode="after")
    def _fits(self) -> RequestEvent:
        if not transition_allowed(self.from_status, self.to_status):
            raise ValueError(f"there is no way from {self.from_status} to {self.to_status}")
        if (self.outcome is not None) != (self.to_status is Status.COMPLETED):
            raise ValueError("`outcome` goes with the status completed, and that needs it")
        return self

    def canonical(self) -> bytes:
        """Return the bytes that are stored."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


class Receipt(Document):
    """What whoever filed a request gets; filing it again gives the same one."""

    id: RequestId = Field(description="the request's id")
    model_line: LineId = Field(description="the model line to erase from")
    received_at: UtcTime = Field(description="when the month began")
    due_at: UtcTime = Field(description="when it ends")
    sha256: Digest = Field(description="SHA-256 of the request as it was filed")

    @classmethod
    def of(cls, request: DeletionRequest) -> Receipt:
        """Return the receipt of a stored request."""
        return cls(
            id=request.id,
            model_line=request.model_line,
            received_at=request.received_at,
            due_at=request.due_at,
            sha256=request.filed_sha256,
        )


class RequestState(Document):
    """A request and its last event; none yet where it was received and no more."""

    request: DeletionRequest = Field(description="the request")
    last: RequestEvent | None = Field(default=None, description="its last event")

    @property
    def status(self) -> Status:
        """Where the request stands."""
        return status_after(self.last)


def status_after(last: RequestEvent | None) -> Status:
    """Return where a request stands after its last event; None where it was received and no more."""
    return last.to_status if last else Status.RECEIVED


def is_overdue(request: DeletionRequest, status: Status, now: datetime) -> bool:
    """Return whether a request is past its month and not settled.

    A hold stops the erasure but not the month; a failed request is not settled.

    Args:
        request: the request.
        status: its status.
        now: the time, with its time zone.
    """
    return status not in SETTLED and as_utc(now) > request.due


def next_attempt(last: RequestEvent | None, to: Status) -> int:
    """Return which try a move belongs to.

    Args:
        last: the event before, None where there is none.
        to: the status that is moved to, one that the transitions allow.

    Returns:
        1 at first, one more when a run gives a request back, 1 again when a person queues it anew.
    """
    if last is None or last.to_status in {Status.FAILED, Status.COMPLETED}:
        return 1
    given_back = last.to_status is Status.IN_PROGRESS and to is Status.QUEUED
    return last.attempt + 1 if given_back else last.attempt


def next_rung(last: RequestEvent | None, given: int | None) -> int:
    """Return which recipe comes next after a move.

    Args:
        last: the event before, None where there is none.
        given: the recipe that the mover names, if any.

    Returns:
        That one, or that of the event before; 0 when a person queues it anew.
    """
    if given is not None:
        return given
    return 0 if last is None or last.to_status in {Status.FAILED, Status.COMPLETED} else last.rung


def summarise(target: Target) -> str:
    """Say what a target names without sample ids, prompts or subject references.

    Example:
        >>> from salun_core.data.forget_set import SamplesTarget
        >>> summarise(SamplesTarget(ids=["a", "b"]))
        '2 samples'
    """
    if isinstance(target, RedactedTarget):
        return f"{_summary(target.of, target.count, target.class_id)} (redacted)"
    if isinstance(target, ClassTarget):
        return _summary("class", 1, target.class_id)
    if isinstance(target, SubjectTarget):
        return _summary("subject", 1, None)
    if isinstance(target, ConceptTarget):
        return _summary("concept", len(target.prompts), None)
    return _summary("samples", len(target.ids or ()), None)


def _summary(kind: str, count: int, class_id: int | str | None) -> str:
    if kind == "class":
        return f"class {class_id}"
    if kind == "subject":
        return "1 subject"
    if kind == "concept":
        return f"1 concept by {_count(count, 'prompt')}"
    return _count(count, "sample") if count else "samples of a manifest"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
