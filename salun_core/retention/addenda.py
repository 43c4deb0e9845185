"""Addenda to certificates: what a purge deleted is added to the certificate of each request that it concerns.

For each run and stage (data in the store, the superseded weights) with nothing left:

1. `disposed-<stage>.json` is created once. It fixes what the addenda contain and the time in them.
2. Each certified request of the run gets an addendum, whose key carries the digest of its content.
3. `attested-<stage>.json` is created, so that later purges skip the stage.

A kill after 1 or within 2 leaves a stage without its mark: the next purge reads the same record, builds the same
addenda, and those that exist are written again without effect. Nothing is recorded before a listing shows that the
files are gone, so no record can claim too much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from salun_core.certificates.statement import DisposalDone
from salun_core.config import Document
from salun_core.digest import canonical_json
from salun_core.errors import ConflictError
from salun_core.registry.holds import read_disposal
from salun_core.registry.rollbacks import read_rollback, undoing
from salun_core.retention.inventory import StoreInventory, by_kind
from salun_core.storage.documents import RunId, parse_stored
from salun_core.storage.erase import StoredKey
from salun_core.storage.keys import run_key
from salun_core.storage.objects import ObjectStore

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Stage = Literal["data", "weights"]


class RunDisposal(Document):
    """What was deleted of a run."""

    format: Literal["salun.run-disposal/v1"] = "salun.run-disposal/v1"
    run: RunId = Field(description="the run")
    stage: Stage = Field(description="data: in the store; weights: of the superseded version")
    done: list[DisposalDone] = Field(min_length=1, description="what was deleted, as in the addenda")


def issue_addenda(
    store: ObjectStore,
    inventory: StoreInventory,
    left: Sequence[StoredKey],
    signer: Ed25519PrivateKey,
    now: datetime,
) -> list[str]:
    """Issue the addenda that are due; it may be killed anywhere and called again.

    `left` is what the store holds after the deletions. Returns the requests whose certificate got an addendum, sorted.
    """
    from salun_core.certificates.issue import issue_addendum

    found = by_kind(left)
    with_data = {values["run"] for kind in ("scratch", "mask", "candidate") for _, values in found.get(kind, ())}
    disposed = StoreInventory(keys=left).disposed
    given: set[str] = set()
    for run, summary in sorted(inventory.runs.items()):
        requests = inventory.certified(run)
        if not requests or inventory.finished_at(run, now) is None:
            continue
        at = now.isoformat()
        gone: dict[Stage, list[DisposalDone]] = {}
        if run not in with_data:
            whats = ("forget data of the run", "masks in the store")
            gone["data"] = [DisposalDone(what=what, at=at) for what in whats]
        if summary.line and summary.parent and (summary.line, summary.parent) in disposed:
            disposal = read_disposal(store, summary.line, summary.parent)
            assert disposal is not None
            gone["weights"] = [DisposalDone(what="weights of the superseded version", at=disposal.at)]
        for stage, done in gone.items():
            if f"attested-{stage}" in summary.marks:
                continue
            record = _record(store, RunDisposal(run=run, stage=stage, done=done))
            for request in requests:
                issue_addendum(store, request, record.done, signer)
            mark = {"format": "salun.attested/v1", "run": run, "stage": stage}
            store.put_new(run_key(run, f"attested-{stage}.json"), canonical_json(mark))
            given.update(requests)
    _revoke_missing(store, inventory, signer)
    return sorted(given)


def _revoke_missing(store: ObjectStore, inventory: StoreInventory, signer: Ed25519PrivateKey) -> None:
    """Revoke the certificates about versions that a rollback without a signing key undid; repeating it is harmless."""
    from salun_core.certificates.issue import revoke

    for line, digest in sorted(inventory.rolled_back & inventory.manifests.keys()):
        run = inventory.manifests[line, digest].run
        members = inventory.runs[run].members if run is not None and run in inventory.runs else ()
        rollback = read_rollback(store, line, digest)
        if members and rollback is not None and undoing(store, line, digest):
            revoke(store, rollback, members, signer)


def _record(store: ObjectStore, record: RunDisposal) -> RunDisposal:
    """Write the record, and return it; if there is one already, return that."""
    key = run_key(record.run, f"disposed-{record.stage}.json")
    with contextlib.suppress(ConflictError):
        store.put_new(key, canonical_json(record.model_dump(mode="json")))
    stored = store.get(key)
    return parse_stored(RunDisposal, stored.data, key) if stored else record
