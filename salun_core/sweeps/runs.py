"""Unlearning runs: the record of what a run was given, and the statuses that it passes through.

Each status change of a run is a document that is created once, like the events of requests: together they are its
audit log. An event is written on the condition that its number is free. If another process was faster, or the reply
was lost, `RunLog.advance` reads the log again; a run that has ended accepts no further events, which stops a worker
that wakes up after its run was settled.
"""

from __future__ import annotations

import contextlib
import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from salun_core.config import Document, parse
from salun_core.errors import ConflictError, IntegrityError, RunSettledError
from salun_core.methods.recipe import Level, Recipe
from salun_core.requests.schema import RequestId, StoredDocument, Tried
from salun_core.storage.documents import Count, Digest, LineId, RunId, ShortText, Text, UtcTime, parse_stored
from salun_core.storage.keys import run_event_key, run_events_prefix, run_key
from salun_core.storage.leases import SUBMIT_AGAIN
from salun_core.storage.objects import ObjectStore
from salun_core.sweeps.policy import Limits
from salun_core.times import Clock, as_utc


class RunStatus(StrEnum):
    """The status of a run."""

    CLAIMED = "claimed"
    MASKING = "masking"
    UNLEARNING = "unlearning"
    EVALUATING = "evaluating"
    GATED = "gated"
    PUBLISHED = "published"
    GATE_REFUSED = "gate_refused"
    STALE_PARENT = "stale_parent"
    FAILED = "failed"


_ORDER = tuple(RunStatus)[:6]
ENDED = frozenset({RunStatus.PUBLISHED, RunStatus.GATE_REFUSED, RunStatus.STALE_PARENT, RunStatus.FAILED})
"""A run with one of these statuses does nothing more."""


class RunMember(Document):
    """A request that a run erases, by what may be kept of it: no target, no sample id."""

    id: RequestId = Field(description="the request")
    event: Annotated[int, Field(ge=1, strict=True)] = Field(description="number of the event that claimed it")
    attempt: Annotated[int, Field(ge=1, strict=True)] = Field(description="attempt of the request, from 1")
    forget_digest: Digest = Field(description="SHA-256 of its own forget set; the certificate shows it salted")
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="random, in hex: for its certificate")
    found: Count = Field(description="training samples that it names")
    named: Count = Field(description="samples that it names, whether the model was trained on them or not")


class RunRecord(StoredDocument):
    """What a run was given; written once, when its requests are claimed."""

    format: Literal["salun.run/v1"] = "salun.run/v1"
    run: RunId = Field(description="the run's id")
    line: LineId = Field(description="the model line")
    parent: Digest = Field(description="the version that it starts from")
    epoch: Annotated[int, Field(ge=1, strict=True)] = Field(description="epoch of the line's lease")
    created_at: UtcTime = Field(description="when its requests were claimed, ISO 8601 in UTC")
    method: ShortText = Field(description="the unlearning method")
    density: float = Field(gt=0, le=1, description="share of the weights that may change")
    method_config: dict[str, Any] = Field(default={}, description="settings that differ from the method's defaults")
    seed: Count = Field(default=0, description="seed of the run")
    rung: Annotated[int, Field(ge=0, le=99, strict=True)] = Field(
        default=0, description="escalation level: number of its recipe"
    )
    tried: list[Tried] | None = Field(default=None, description="recipes that were refused for its requests before")
    group: ShortText | None = Field(default=None, description="the half of a refused batch that it is")
    levels: list[Level] = Field(
        min_length=1, max_length=100, description="what the recipes of the escalation are for that `rung` counts in"
    )
    max_attempts: Annotated[int, Field(ge=1, strict=True)] = Field(
        description="most attempts of a request, before a person decides"
    )
    work_key: Digest = Field(description="digest of line, parent, forget set and recipe: equal work has an equal key")
    members: list[RunMember] = Field(min_length=1, description="its requests")
    forget_sha256: Digest = Field(description="SHA-256 of the frozen forget set that the run reads")
    policy_digest: Digest | None = Field(
        default=None, description="SHA-256 of the gate policy that was named; none for `auto`"
    )
    forget_count: Count = Field(description="training samples to forget, of all members together")
    train_count: Count = Field(description="training samples of the parent")

    @property
    def recipe(self) -> Recipe:
        """How the run unlearns."""
        return Recipe(method=self.method, density=self.density, method_config=self.method_config, seed=self.seed)

    @property
    def limits(self) -> Limits:
        """When its requests are given up."""
        return Limits(tuple(self.levels), self.max_attempts)


class RunEvent(StoredDocument):
    """One status change of a run."""

    format: Literal["salun.run-event/v1"] = "salun.run-event/v1"
    run: RunId = Field(description="the run")
    n: Annotated[int, Field(ge=1, le=999_999, strict=True)] = Field(description="number of the event, from 1")
    at: UtcTime = Field(description="when, ISO 8601 in UTC")
    actor: ShortText = Field(description="the step that changed it")
    from_status: RunStatus | None = Field(default=None, description="the status before; none at first")
    to_status: RunStatus = Field(description="the status after")
    reason: Text = Field(description="why; no personal data")
    epoch: Annotated[int, Field(ge=1, strict=True)] = Field(description="epoch of the line's lease")
    writer: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="random token of the writing call")


def new_run_id() -> str:
    """Return a new run id such as `run-20260131-120000-3f9a1c`."""
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class RunLog:
    """Records runs and their status changes."""

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        self._store, self._clock = store, clock

    def start(self, record: RunRecord, actor: str) -> None:
        """Record a run that claimed its requests; repeating it is harmless. ConflictError if it has another record."""
        self._store.put_new(run_key(record.run, "run.json"), record.canonical())
        if self.last(record.run) is None:
            with contextlib.suppress(ConflictError):  # a twin of this call was faster
                self._append(record, None, RunStatus.CLAIMED, actor, "claimed")

    def read(self, run: str) -> RunRecord | None:
        """Return the record of a run, or None if it claimed nothing."""
        key = run_key(run, "run.json")
        stored = self._store.get(key)
        if stored is None:
            return None
        record = parse_stored(RunRecord, stored.data, key)
        if record.run != run:
            raise IntegrityError(f"{key} is run {record.run!r}", "it was copied or moved", "restore the right one")
        return record

    def request_count(self, run: str) -> int | None:
        """Return how many requests a run claimed, or None if it claimed nothing; raises as `read`."""
        record = self.read(run)
        return len(record.members) if record else None

    def last(self, run: str) -> RunEvent | None:
        """Return the last event of a run, or None before its first."""
        keys = [entry.key for entry in self._store.list(run_events_prefix(run))]
        if not keys:
            return None
        stored = self._store.get(keys[-1])
        if stored is None or keys != [run_event_key(run, number) for number in range(1, len(keys) + 1)]:
            raise IntegrityError(
                f"the events of run {run} are incomplete", "an event is missing", "restore them from a copy"
            )
        event = parse_stored(RunEvent, stored.data, keys[-1])
        if (event.run, event.n) != (run, len(keys)):
            raise IntegrityError(f"{keys[-1]} is another event", "it was copied or moved", "restore the right one")
        return event

    def status(self, run: str) -> RunStatus | None:
        """Return the status of a run, or None before its first event."""
        last = self.last(run)
        return last.to_status if last else None

    def advance(self, run: str, to: RunStatus, actor: str, reason: str) -> RunStatus:
        """Move a run forward and return its status; a run that has this status or a later one stays unchanged.

        So a step that is tried again continues where it stopped. A run without a record has no log; none is needed.
        RunSettledError if the run has ended with another status.
        """
        record = self.read(run)
        if record is None:
            return to
        while True:
            last = self.last(run)
            status = last.to_status if last else RunStatus.CLAIMED
            beyond = status in _ORDER and to in _ORDER and _ORDER.index(status) >= _ORDER.index(to)
            if status == to or beyond:
                return status
            if status in ENDED:
                raise RunSettledError(f"run {run} has ended", f"it is {status} and cannot become {to}", SUBMIT_AGAIN)
            with contextlib.suppress(ConflictError):  # another process moved it meanwhile: read again
                self._append(record, last, to, actor, reason)
                return to

    def _append(self, record: RunRecord, last: RunEvent | None, to: RunStatus, actor: str, reason: str) -> None:
        fields = {
            "run": record.run,
            "n": last.n + 1 if last else 1,
            "at": as_utc(self._clock()).isoformat(),
            "actor": actor,
            "from_status": last.to_status if last else None,
            "to_status": to,
            "reason": reason,
            "epoch": record.epoch,
            "writer": secrets.token_hex(16),
        }
        event = parse(RunEvent, fields, f"an event of run {record.run}")
        self._store.put_new(run_event_key(record.run, event.n), event.canonical())
