"""The outcome of a run: one small document in the store that says how the run ended, and what to do next.

A step of a pipeline that reaches a verdict (refused, stale parent, wrong input, nothing due, line held) succeeds and
writes it here. The last step reads it and fails the run if it is bad; `submit --wait` and `status` print it. While a
run works, the document names the step at work, so that the exit handler can report a step that was killed.

Two steps never work at the same time, but a step that was given up may wake up beside the exit handler. Every write is
conditional, and the first final outcome stays: it is what requests and certificates were settled by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from salun_core.errors import ConflictError
from salun_core.gate import Assurance
from salun_core.requests.schema import StoredDocument
from salun_core.storage.documents import Count, LineId, RunId, Text, UtcTime, one_line, parse_stored
from salun_core.storage.keys import run_key
from salun_core.storage.objects import ObjectStore
from salun_core.times import Clock, as_utc, utc_clock

OUTCOME_FILE = "outcome.json"
EVIDENCE, REPORT = "evidence.json", "report.html"
"""The other files of a run that last, in `runs/RUN/` or with the version that it published."""


class RunState(StrEnum):
    """How a run ended, or that it still works."""

    RUNNING = "running"
    PUBLISHED = "published"
    NOTHING_TO_DO = "nothing_to_do"
    LINE_HELD = "line_held"
    REFUSED = "refused"
    STALE_PARENT = "stale_parent"
    WRONG_INPUT = "wrong_input"
    DAMAGED = "damaged"
    SETTLED_BEFORE = "settled_before"
    FAILED = "failed"
    KILLED = "killed"


EXIT_CODES: Mapping[RunState, int] = {
    RunState.RUNNING: 0,
    RunState.PUBLISHED: 0,
    RunState.NOTHING_TO_DO: 0,
    RunState.LINE_HELD: 4,
    RunState.REFUSED: 3,
    RunState.STALE_PARENT: 4,
    RunState.WRONG_INPUT: 2,
    RunState.DAMAGED: 5,
    RunState.SETTLED_BEFORE: 4,
    RunState.FAILED: 1,
    RunState.KILLED: 1,
}
"""The exit code of `submit --wait` by state; a sweep that finds its line held writes 0, as the next one tries again."""


class OutcomeRecord(StoredDocument):
    """How a run ended; no sample id and no target is in it."""

    format: Literal["salun.outcome/v1"] = "salun.outcome/v1"
    run: RunId = Field(description="the run")
    line: LineId = Field(description="the model line")
    state: RunState = Field(description="how the run ended, or that it still works")
    code: Annotated[int, Field(ge=0, le=125, strict=True)] = Field(description="exit code of `submit --wait`")
    text: Text = Field(description="what happened, in one line")
    next: str = Field(default="", max_length=500, description="the command or the change that comes next")
    step: str = Field(default="", max_length=64, description="the step that works, or that ended the run")
    at: UtcTime = Field(description="when it was written, ISO 8601 in UTC")
    fault: bool = Field(default=False, description="whether the step at work ended with the fault that `text` names")
    report: str = Field(default="", max_length=1000, description="address of the report; empty if there is none")
    version: str = Field(default="", max_length=64, description="digest of the version that was published")
    assurance: Assurance | None = Field(default=None, description="how sure the forgetting of that version is")
    completed: Count = Field(default=0, description="requests that were erased and certified")
    queued: Count = Field(default=0, description="requests that are queued again")
    failed: Count = Field(default=0, description="requests that a person must look at")

    @property
    def final(self) -> bool:
        """Whether the run has ended."""
        return self.state is not RunState.RUNNING


def read_outcome(store: ObjectStore, run: str) -> OutcomeRecord | None:
    """Return the outcome of a run, or None if none was written yet. IntegrityError if it is damaged."""
    key = run_key(run, OUTCOME_FILE)
    stored = store.get(key)
    return parse_stored(OutcomeRecord, stored.data, key) if stored else None


def write_outcome(store: ObjectStore, outcome: OutcomeRecord) -> OutcomeRecord:
    """Write the outcome of a run, unless it has a final one already, and return the outcome that is stored now."""
    key, data = run_key(outcome.run, OUTCOME_FILE), outcome.canonical()
    while True:
        stored = store.get(key)
        there = parse_stored(OutcomeRecord, stored.data, key) if stored else None
        if there is not None and there.final:
            return there
        try:
            if stored is None:
                store.put_new(key, data)
            else:
                store.put_if(key, data, stored.etag)
        except ConflictError:  # another step wrote meanwhile: look again whether its outcome is final
            continue
        return outcome


def add_counts(store: ObjectStore, run: str, completed: int, queued: int, failed: int) -> OutcomeRecord | None:
    """Add to a final outcome what became of the requests; its other fields stay.

    Repeating it is harmless. Returns the outcome that is stored now; None if there is none.
    """
    key, counts = run_key(run, OUTCOME_FILE), {"completed": completed, "queued": queued, "failed": failed}
    while (stored := store.get(key)) is not None:
        there = parse_stored(OutcomeRecord, stored.data, key)
        changed = there.model_copy(update=counts)
        # A second settling finds nothing left to settle: its zeros do not replace what the first one counted.
        if not there.final or not any(counts.values()) or changed == there:
            return there
        with suppress(ConflictError):  # another step wrote meanwhile: read it again
            store.put_if(key, changed.canonical(), stored.etag)
            return changed
    return None


def new_outcome(
    run: str,
    line: str,
    state: RunState,
    text: str,
    clock: Clock = utc_clock,
    **fields: Any,  # noqa: ANN401 - of the record
) -> OutcomeRecord:
    """Return an outcome with its time and its exit code, which `code` in `fields` replaces.

    `text` and `next` are cut at 500 characters, in one line. They may come from Kubeflow or from a store, so that
    nothing in them is refused: this is called while an error is handled.
    """
    document = {
        "run": run,
        "line": line,
        "state": state,
        "code": EXIT_CODES[state],
        "text": one_line(text) or str(state),
        "at": as_utc(clock()).isoformat(),
        **fields,
        "next": one_line(fields.get("next", "")),
    }
    return OutcomeRecord.model_validate_json(json.dumps(document))
