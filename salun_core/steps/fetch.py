"""Step 1: fetch the HEAD of a model line and check that there is something to forget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from salun_core.errors import UsageError
from salun_core.registry.lookup import read_head
from salun_core.registry.versions import fetch_version
from salun_core.steps.observe import RunRef, observed
from salun_core.storage import open_store
from salun_core.tasks import open_inputs


@dataclass(frozen=True)
class Fetched:
    """What the step found.

    Args:
        version: digest of the version that was HEAD.
        forget_count: training samples to forget.
        train_count: training samples in all.
    """

    version: str
    forget_count: int
    train_count: int


def fetch_model(
    store_uri: str, model_line: str, forget_manifest_uri: str, out: Path, run: RunRef | None = None
) -> Fetched:
    """Fetch HEAD of a line into a folder and resolve the forget set against its split.

    Args:
        store_uri: `s3://bucket/prefix`.
        model_line: name of the line.
        forget_manifest_uri: address of the forget targets.
        out: folder for the model; it appears whole or not at all.
        run: the run that the step belongs to.

    Returns:
        What was found.

    Raises:
        UsageError: no such line, or a target that does not fit the data.
        DataError: there is nothing to forget, or nothing to keep.
        IntegrityError: a stored file or the data do not match their digests.
    """
    with observed("fetch_model", model_line, run):
        store = open_store(store_uri)
        head = read_head(store, model_line)
        if head is None:
            raise UsageError(
                f"model line {model_line} has no HEAD", "nothing was published", "use `salun model import`"
            )
        fetch_version(store, model_line, head[0].version, out)
        inputs = open_inputs(out, forget_manifest_uri)
        return Fetched(head[0].version, len(inputs.forget_set.ids), len(inputs.original.split.train))
