"""What claiming and settling share: the store, the ledger, the log of runs, the clock and the certifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from salun_core.registry.lookup import Version
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import DeletionRequest, Outcome
from salun_core.storage.objects import FileStore
from salun_core.sweeps.runs import RunLog, RunMember, RunRecord
from salun_core.times import Clock

_WORKERS = 16
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Erased:
    """All that a certificate says of one request.

    Args:
        request: the request.
        outcome: how it was met.
        version: the version that has forgotten it, or that was searched.
        member: what the run knew of it.
        record: the run; None where there was nothing to erase.
        completed_at: when, ISO 8601 in UTC.
    """

    request: DeletionRequest
    outcome: Outcome
    version: Version
    member: RunMember
    record: RunRecord | None
    completed_at: str


class Certifier(Protocol):
    """Issues the certificate of one request; doing it again gives the same one."""

    def certify(self, erased: Erased) -> str:
        """Write the certificate and return its SHA-256."""
        ...


@dataclass(frozen=True)
class SweepContext:
    """Where requests and runs are recorded.

    Args:
        store: the store.
        clock: gives the time now.
        certifier: issues certificates.
        actor: who moves requests, for the audit log.
    """

    store: FileStore
    clock: Clock
    certifier: Certifier
    actor: str = "sweep"
    ledger: Ledger = field(init=False)
    runs: RunLog = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ledger", Ledger(self.store, self.clock))
        object.__setattr__(self, "runs", RunLog(self.store, self.clock))


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do the same for each of many items, by many threads, and return the results in their order."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_WORKERS, len(items))) as pool:
        return list(pool.map(work, items))
