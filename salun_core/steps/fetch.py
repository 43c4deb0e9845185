"""Step 1: fetch the HEAD of a model line and check that there is something to forget."""

from __future__ import annotations

from dataclasses import dataclass

from salun_core.registry.lookup import require_head
from salun_core.registry.versions import fetch_version
from salun_core.steps.context import RunContext


@dataclass(frozen=True)
class Fetched:
    """What the step found: the digest of the version that was HEAD, and numbers of training samples."""

    version: str
    forget_count: int
    train_count: int


def fetch_model(context: RunContext) -> Fetched:
    """Fetch HEAD of the context's model line into `context.before` and resolve the forget set against its split.

    DataError: there is nothing to forget, or nothing to keep. IntegrityError: the forget set is not the claimed one.
    """
    with context.observed("fetch_model"):
        head = require_head(context.store, context.model_line)  # under the lease: a run before may have moved it
        fetch_version(context.store, context.model_line, head.version, context.before)
        context.require_claimed()
        return Fetched(head.version, len(context.inputs.forget_set.ids), len(context.inputs.split.train))
