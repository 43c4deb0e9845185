"""Seals the targets of many requests into the one document that an unlearning run reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import UsageError
from salun_core.requests.schema import DeletionRequest
from salun_core.storage.names import scratch_key
from salun_core.storage.objects import FileStore

_FILE = "forget.json"


@dataclass(frozen=True)
class SealedBatch:
    """The forget targets of a run.

    Args:
        uri: address of the JSON list of forget targets.
        sha256: SHA-256 of its bytes.
        targets: how many it holds.
    """

    uri: str
    sha256: str
    targets: int


def seal_batch(store: FileStore, requests: Sequence[DeletionRequest], run_id: str) -> SealedBatch:
    """Write the union of the requests' targets, once and for all.

    The document names no request, and its order tells nothing of them. The same requests give the same bytes, so
    that a run that begins again finds its batch.

    Args:
        store: where to.
        requests: at least one, all of one model line.
        run_id: the run that will read it.

    Raises:
        UsageError: there is no request, or they are of several model lines.
        ConflictError: the run has another batch already.
    """
    lines = sorted({request.model_line for request in requests})
    if len(lines) != 1:
        raise UsageError(
            f"a batch is of one model line, this one of {len(lines)}",
            ", ".join(lines) or "there is no request in it",
            "seal one batch for each line",
        )
    distinct = {canonical_json(request.target.model_dump(mode="json", exclude_none=True)) for request in requests}
    data, key = b"[" + b",".join(sorted(distinct)) + b"]", scratch_key(run_id, _FILE)
    store.put_new(key, data)
    return SealedBatch(f"{store.uri}/{key}", sha256_bytes(data), len(distinct))
