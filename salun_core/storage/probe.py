"""Tests whether a store keeps its promises about conditional writes, before anything depends on them.

Some stores accept the conditions and ignore them: SeaweedFS 4.16 let all racing creates succeed, and others ignore
conditions on versioned buckets. On such a store two runs could publish at once, and one would bring back what the
other has forgotten. The races run with many writers because a wrong store may get a race of two right by chance.
A probe writes below a random folder only; killed, it leaves a few small objects there, which a purge deletes.
"""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from salun_core.config import Document
from salun_core.errors import StoreError
from salun_core.storage.keys import probe_key

if TYPE_CHECKING:
    from salun_core.storage.s3 import S3Store

_RACES = 3


class ProbeCheck(Document):
    """One promise that was tested."""

    name: str = Field(description="the promise")
    passed: bool = Field(description="whether the store kept it")
    detail: str = Field(description="what was observed")


class ProbeReport(Document):
    """The result of a probe."""

    uri: str = Field(description="the store")
    checks: tuple[ProbeCheck, ...] = Field(description="each promise")
    seconds: float = Field(description="how long it took")

    @property
    def safe(self) -> bool:
        """Whether every promise was kept."""
        return all(check.passed for check in self.checks)


def probe(store: S3Store) -> ProbeReport:
    """Test a store's conditional writes, on keys below its prefix that are deleted afterwards.

    It checks each promise: one winner of 16 racing creates and of 8 racing swaps, a stale etag refused, a fresh one
    accepted, a missing key refused, and what was written is read and listed.
    """
    begin = time.monotonic()
    folder = probe_key(secrets.token_hex(8))
    races = (partial(_one_winner, swap=False), partial(_one_winner, swap=True))
    promises = (*races, _stale_etag, _fresh_etag, _missing_key, _read_after_write)
    try:
        with ThreadPoolExecutor(len(promises)) as pool:  # a store may make the losers of a race wait
            checks = tuple(pool.map(lambda promise: promise(store, folder), promises))
    finally:
        for entry in store.list(f"{folder}/"):
            store.delete(entry.key)
    return ProbeReport(uri=store.uri, checks=checks, seconds=round(time.monotonic() - begin, 3))


def require_safe(store: S3Store) -> ProbeReport:
    """Probe a store, and refuse it unless every promise was kept; the StoreError names each broken one."""
    report = probe(store)
    if report.safe:
        return report
    broken = "; ".join(f"{check.name} ({check.detail})" for check in report.checks if not check.passed)
    raise StoreError(
        f"{store.uri} is not safe for model lines",
        f"its conditional writes fail: {broken}",
        "use a store with conditional writes (AWS S3, SeaweedFS 4.17 or later, MinIO), on a bucket without a proxy",
    )


def _race(store: S3Store, key: str, etag: str | None, racers: int) -> list[bytes]:
    """Let all racers write at once; return the bodies that won."""
    barrier = threading.Barrier(racers)

    def write(number: int) -> bytes | None:
        body = f"racer {number} {secrets.token_hex(8)}".encode()
        barrier.wait()
        return body if store.try_put(key, body, etag) is not None else None

    with ThreadPoolExecutor(racers) as pool:
        return [body for body in pool.map(write, range(racers)) if body is not None]


def _one_winner(store: S3Store, folder: str, *, swap: bool) -> ProbeCheck:
    """Run a race, and again if nobody won (the winner's reply may have been lost)."""
    name, racers = ("of racing swaps one wins", 8) if swap else ("of racing creates one wins", 16)
    for number in range(_RACES):
        key = f"{folder}/{'swap' if swap else 'create'}-{number}"
        etag = store.try_put(key, b"start") or "" if swap else None
        winners = _race(store, key, etag, racers)
        if len(winners) > 1:
            return ProbeCheck(name=name, passed=False, detail=f"{len(winners)} of {racers} writers won")
        if winners and not _holds(store, key, winners[0]):
            return ProbeCheck(name=name, passed=False, detail="the store does not hold what the winner wrote")
        if winners:
            return ProbeCheck(name=name, passed=True, detail=f"1 of {racers} writers won")
    return ProbeCheck(name=name, passed=False, detail="nobody won")


def _stale_etag(store: S3Store, folder: str) -> ProbeCheck:
    key = f"{folder}/stale"
    old = store.try_put(key, b"first") or ""
    store.try_put(key, b"second", old)
    kept = store.try_put(key, b"third", old) is None and _holds(store, key, b"second")
    return _check("a stale etag is refused", kept, "the store accepted or wrote it")


def _fresh_etag(store: S3Store, folder: str) -> ProbeCheck:
    key = f"{folder}/fresh"
    etag = store.try_put(key, b"first") or ""
    kept = store.try_put(key, b"second", etag) is not None and _holds(store, key, b"second")
    return _check("a fresh etag is accepted", kept, "the store refused or did not write it")


def _missing_key(store: S3Store, folder: str) -> ProbeCheck:
    key = f"{folder}/missing"
    etag = store.try_put(f"{folder}/other", b"other") or ""
    kept = store.try_put(key, b"ghost", etag) is None and store.get(key) is None
    return _check("a swap of a missing key is refused", kept, "the store created it")


def _read_after_write(store: S3Store, folder: str) -> ProbeCheck:
    key = f"{folder}/read"
    etag = store.try_put(key, b"written")
    found = store.get(key)
    seen = found is not None and (found.data, found.etag) == (b"written", etag)
    listed = [entry.key for entry in store.list(key)] == [key]
    return _check("what was written is read and listed", seen and listed, "it was not found, or with another etag")


def _holds(store: S3Store, key: str, data: bytes) -> bool:
    found = store.get(key)
    return found is not None and found.data == data


def _check(name: str, passed: bool, fault: str) -> ProbeCheck:
    return ProbeCheck(name=name, passed=passed, detail="kept" if passed else fault)
