"""Finds out whether a store keeps its word on conditional writes, before anything relies on it.

Some stores accept the conditions and ignore them (SeaweedFS 4.16 let racing creates all succeed; others
ignore them on versioned buckets). On such a store two workers could publish at once, and what was forgotten
would come back.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from pydantic import Field

from salun_core.config import Document
from salun_core.errors import StoreError
from salun_core.storage.keys import probe_key
from salun_core.storage.objects import ObjectStore

_CREATORS = 16
_SWAPPERS = 8
_RACES = 3

Write = Callable[[bytes], str | None]


class ProbedStore(ObjectStore, Protocol):
    """A store that also offers the bare conditional write, which does not look whose write the store holds."""

    @property
    def uri(self) -> str:
        """The address of the store."""
        ...

    def try_put(self, key: str, data: bytes, etag: str | None = None) -> str | None:
        """Write once; the new etag, or None where the condition was false."""
        ...


class ProbeCheck(Document):
    """One promise that was put to the test."""

    name: str = Field(description="the promise")
    passed: bool = Field(description="whether the store kept it")
    detail: str = Field(description="what was seen")


class ProbeReport(Document):
    """What a probe found."""

    uri: str = Field(description="the store")
    checks: tuple[ProbeCheck, ...] = Field(description="each promise")
    seconds: float = Field(description="how long it took")

    @property
    def safe(self) -> bool:
        """Whether every promise was kept."""
        return all(check.passed for check in self.checks)


def probe(store: ProbedStore) -> ProbeReport:
    """Put a store's conditional writes to the test, on keys of its own that are deleted afterwards.

    Args:
        store: the store; it needs the right to write and delete below its prefix.

    Returns:
        A check for each promise: one winner of 16 racing creates and of 8 racing swaps, a stale etag
        refused, a fresh one accepted, a missing key refused, what was written is read and listed.

    Raises:
        StoreError: the store cannot be reached or refuses us.
    """
    begin = time.monotonic()
    folder = probe_key(secrets.token_hex(8))
    promises = (_one_creator, _one_swapper, _stale_etag, _fresh_etag, _missing_key, _read_after_write)
    try:
        with ThreadPoolExecutor(len(promises)) as pool:  # a store may make the losers of a race wait
            checks = tuple(pool.map(lambda promise: promise(store, folder), promises))
    finally:
        for entry in store.list(f"{folder}/"):
            store.delete(entry.key)
    return ProbeReport(uri=store.uri, checks=checks, seconds=round(time.monotonic() - begin, 3))


def require_safe(store: ProbedStore) -> ProbeReport:
    """Probe a store, and refuse it unless every promise was kept.

    Raises:
        StoreError: it is unsafe; the message names each broken promise.
    """
    report = probe(store)
    if report.safe:
        return report
    broken = "; ".join(f"{check.name} ({check.detail})" for check in report.checks if not check.passed)
    raise StoreError(
        f"{store.uri} is not safe for model lines",
        f"its conditional writes fail: {broken}",
        "use a store with conditional writes (AWS S3, SeaweedFS 4.17 or later, MinIO), on a bucket without a proxy",
    )


def _race(write: Write, racers: int) -> list[bytes]:
    """Let all racers write at once; return the bodies that won."""
    barrier = threading.Barrier(racers)

    def run(body: bytes) -> tuple[bytes, str | None]:
        barrier.wait()
        return body, write(body)

    bodies = [f"racer {number} {secrets.token_hex(8)}".encode() for number in range(racers)]
    with ThreadPoolExecutor(racers) as pool:
        outcomes = list(pool.map(run, bodies))
    return [body for body, etag in outcomes if etag is not None]


def _judge(store: ProbedStore, name: str, racers: int, contest: Callable[[int], tuple[str, Write]]) -> ProbeCheck:
    """Run a race; one without any winner (its reply was lost) is run again."""
    for number in range(_RACES):
        key, write = contest(number)
        winners = _race(write, racers)
        found = store.get(key)
        if len(winners) > 1:
            return ProbeCheck(name=name, passed=False, detail=f"{len(winners)} of {racers} writers won")
        if winners and (found is None or found.data != winners[0]):
            return ProbeCheck(name=name, passed=False, detail="the store does not hold what the winner wrote")
        if winners:
            return ProbeCheck(name=name, passed=True, detail=f"1 of {racers} writers won")
    return ProbeCheck(name=name, passed=False, detail="nobody won")


def _one_creator(store: ProbedStore, folder: str) -> ProbeCheck:
    def contest(number: int) -> tuple[str, Write]:
        key = f"{folder}/create-{number}"
        return key, lambda body: store.try_put(key, body)

    return _judge(store, "of racing creates one wins", _CREATORS, contest)


def _one_swapper(store: ProbedStore, folder: str) -> ProbeCheck:
    def contest(number: int) -> tuple[str, Write]:
        key = f"{folder}/swap-{number}"
        etag = store.try_put(key, b"start") or ""
        return key, lambda body: store.try_put(key, body, etag)

    return _judge(store, "of racing swaps one wins", _SWAPPERS, contest)


def _stale_etag(store: ProbedStore, folder: str) -> ProbeCheck:
    key = f"{folder}/stale"
    old = store.try_put(key, b"first") or ""
    store.try_put(key, b"second", old)
    refused = store.try_put(key, b"third", old) is None
    return _check(
        "a stale etag is refused", refused and _holds(store, key, b"second"), "accepted or written all the same"
    )


def _fresh_etag(store: ProbedStore, folder: str) -> ProbeCheck:
    key = f"{folder}/fresh"
    etag = store.try_put(key, b"first") or ""
    swapped = store.try_put(key, b"second", etag) is not None
    return _check("a fresh etag is accepted", swapped and _holds(store, key, b"second"), "refused, or not written")


def _missing_key(store: ProbedStore, folder: str) -> ProbeCheck:
    key = f"{folder}/missing"
    etag = store.try_put(f"{folder}/other", b"other") or ""
    refused = store.try_put(key, b"ghost", etag) is None
    return _check("a swap of a missing key is refused", refused and store.get(key) is None, "it was created")


def _read_after_write(store: ProbedStore, folder: str) -> ProbeCheck:
    key = f"{folder}/read"
    etag = store.try_put(key, b"written")
    found = store.get(key)
    listed = [entry.key for entry in store.list(key)]
    seen = found is not None and found.data == b"written" and found.etag == etag and listed == [key]
    return _check("what was written is read and listed", seen, "it was not seen, or with another etag")


def _holds(store: ProbedStore, key: str, data: bytes) -> bool:
    found = store.get(key)
    return found is not None and found.data == data


def _check(name: str, passed: bool, fault: str) -> ProbeCheck:
    return ProbeCheck(name=name, passed=passed, detail="kept" if passed else fault)
