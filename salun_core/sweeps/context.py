"""What claiming and settling share: the store, the ledger, the log of runs, the clock and the certifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from salun_core.certificates.issue import CertificateInput
from salun_core.requests.ledger import Ledger
from salun_core.storage.objects import FileStore
from salun_core.sweeps.runs import RunLog
from salun_core.times import Clock

_WORKERS = 16
T = TypeVar("T")
R = TypeVar("R")


class Certifier(Protocol):
    """Issues the certificate of one request; repeating it gives the same certificate."""

    def certify(self, facts: CertificateInput) -> str:
        """Write the certificate and return its SHA-256."""
        ...


@dataclass(frozen=True)
class SweepContext:
    """What a sweep works with; `actor` is who moves requests, for the audit log."""

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
    """Apply a function to many items with many threads, and return the results in order."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_WORKERS, len(items))) as pool:
        return list(pool.map(work, items))
