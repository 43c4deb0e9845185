"""Attests what was disposed of: a record for each run first, then an addendum to each certificate of its requests.

The record fixes what is said and when, so that whoever goes on after a kill issues the very same addenda.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from salun_core.certificates.statement import DisposalDone
from salun_core.config import Document
from salun_core.digest import canonical_json
from salun_core.errors import ConflictError
from salun_core.registry.holds import read_disposal
from salun_core.retention.inventory import RunFacts, Stock
from salun_core.storage.documents import RunId, parse_stored
from salun_core.storage.erase import StoredKey
from salun_core.storage.keys import kind_of_key, run_key
from salun_core.storage.objects import ObjectStore

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Stage = Literal["data", "artifacts", "weights"]
STAGES: tuple[Stage, ...] = ("data", "artifacts", "weights")
_OF_A_RUN = {"scratch", "mask", "candidate"}


class RunDisposal(Document):
    """What of a run is gone for good."""

    format: Literal["salun.run-disposal/v1"] = "salun.run-disposal/v1"
    run: RunId = Field(description="the run")
    stage: Stage = Field(description="data: of the store; artifacts: of Kubeflow; weights: of the superseded version")
    done: list[DisposalDone] = Field(min_length=1, description="what is gone, as the addenda say it")


def certified(stock: Stock, run: str) -> list[str]:
    """Return the requests that a run erased and that have a certificate."""
    return [name for name in stock.erased_by(run) if name in stock.certificates]


def attest(
    store: ObjectStore,
    stock: Stock,
    left: Sequence[StoredKey],
    artifacts_left: Collection[str] | None,
    signer: Ed25519PrivateKey,
    now: datetime,
) -> list[str]:
    """Issue the addenda that are due; the call may be repeated, and goes on where it was killed.

    Args:
        store: where.
        stock: runs and requests.
        left: what the store holds now.
        artifacts_left: runs with weights or masks under the pipeline root; None where nobody looked there.
        signer: the signing key.
        now: the time, with its time zone.

    Returns:
        The requests whose certificate got an addendum, sorted.
    """
    given: set[str] = set()
    gone = _gone(Stock(keys=left), artifacts_left)
    for run, facts in sorted(stock.runs.items()):
        if not facts.members or stock.finished_at(run, now) is None:
            continue
        for stage in STAGES:
            if f"attested-{stage}" not in facts.marks and gone[stage](run, facts):
                given.update(_attest(store, stock, run, stage, signer, now))
    return sorted(given)


def _gone(left: Stock, artifacts_left: Collection[str] | None) -> dict[Stage, Callable[[str, RunFacts], bool]]:
    """Return for each stage whether everything of it is gone, of a run."""
    found = map(kind_of_key, (item.key for item in left.keys))
    with_data = {names["run"] for kind, names in found if kind in _OF_A_RUN}
    return {
        "data": lambda run, _: run not in with_data,
        "artifacts": lambda run, _: artifacts_left is not None and run not in artifacts_left,
        "weights": lambda _, facts: (facts.line, facts.parent) in left.disposed,
    }


def _attest(
    store: ObjectStore, stock: Stock, run: str, stage: Stage, signer: Ed25519PrivateKey, now: datetime
) -> list[str]:
    from salun_core.certificates.issue import issue_addendum

    requests = certified(stock, run)
    if not requests:
        return []
    record = _record(store, RunDisposal(run=run, stage=stage, done=list(_done(store, stock, run, stage, now))))
    for request in requests:
        issue_addendum(store, request, record.done, signer)
    mark = {"format": "salun.attested/v1", "run": run, "stage": stage}
    store.put_new(run_key(run, f"attested-{stage}.json"), canonical_json(mark))
    return requests


def _done(store: ObjectStore, stock: Stock, run: str, stage: Stage, now: datetime) -> Iterator[DisposalDone]:
    facts, at = stock.runs[run], now.isoformat()
    if stage == "data":
        yield DisposalDone(what="forget data of the run", at=at)
        yield DisposalDone(what="masks in the store", at=at)
    elif stage == "artifacts":
        yield DisposalDone(what="weights and masks under the pipeline root", at=at)
    else:
        found = read_disposal(store, facts.line or "", facts.parent or "")
        assert found is not None
        yield DisposalDone(what="weights of the superseded version", at=found.at)


def _record(store: ObjectStore, record: RunDisposal) -> RunDisposal:
    """Write the record; one that is there already stands."""
    key = run_key(record.run, f"disposed-{record.stage}.json")
    with contextlib.suppress(ConflictError):
        store.put_new(key, canonical_json(record.model_dump(mode="json")))
    stored = store.get(key)
    return parse_stored(RunDisposal, stored.data, key) if stored else record
