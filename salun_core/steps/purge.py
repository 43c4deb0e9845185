"""The purge step of the sweep pipeline, and of `salun purge`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from salun_core.data.stored import BlockCache
from salun_core.retention.purge import PurgeReport, purge
from salun_core.retention.rules import RetentionRules
from salun_core.storage import open_store
from salun_core.telemetry.observe import observed
from salun_core.times import Clock, utc_clock

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALL_LINES = "all"  # the metrics of this step belong to no single model line


def purge_store(
    store_uri: str,
    rules: RetentionRules | None = None,
    *,
    dry_run: bool = False,
    signer: Ed25519PrivateKey | None = None,
    clock: Clock = utc_clock,
    run: str = "",
) -> PurgeReport:
    """Purge a store, and log and measure it as a step; see `retention.purge.purge`.

    A cache of data (`SALUN_DATA_CACHE`) is emptied, if this machine has one; if that fails with a StoreError, the store
    was purged nevertheless. The default rules keep things for the longest allowed time. `dry_run` returns the plan and
    deletes nothing.
    """
    with observed("purge", ALL_LINES, run):
        store = open_store(store_uri)
        try:  # neither of both waits for the other to succeed
            cache = None if dry_run else BlockCache.from_environment()
            cached = cache.expire(keep=0) if cache else 0
        finally:
            report = purge(store, rules, dry_run=dry_run, signer=signer, clock=clock)
        return replace(report, cached=cached)
