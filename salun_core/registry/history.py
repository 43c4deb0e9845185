"""Tells the story of a model line: what each version erased, how its files are kept, and who holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from salun_core.registry.holds import holds, read_disposal
from salun_core.registry.lookup import Version, history
from salun_core.registry.manifest import weight_files
from salun_core.storage import FileStore
from salun_core.storage.blobs import blob_size, stored_size
from salun_core.sweeps.runs import RunLog
from salun_core.times import utc_clock

DEBT_LIMIT, RUNS_LIMIT = 0.05, 10

Kept = Literal["whole", "sparse", "purged", "missing"]


@dataclass(frozen=True)
class Chapter:
    """One version of a line.

    Args:
        version: its digest and manifest.
        requests: how many deletion requests its run erased; None where no run of the ledger made it.
        kept: how its weights lie in the store.
        held_by: who keeps it from being purged, and why; None where nobody does.
        alarm: whether so much was forgotten since the last full training that a new one is due.
    """

    version: Version
    requests: int | None
    kept: Kept
    held_by: str | None
    alarm: bool


def tell(store: FileStore, line: str) -> Sequence[Chapter]:
    """Return the versions of a line, the newest first.

    Raises:
        UsageError: there is no such line.
        IntegrityError: a manifest on the way is damaged or missing.
    """
    held = {hold.version: f"{hold.by}: {hold.reason}" for hold in holds(store, line)}
    runs = RunLog(store, utc_clock)
    return [_chapter(store, line, item, runs, held.get(item.digest)) for item in history(store, line)]


def _chapter(store: FileStore, line: str, item: Version, runs: RunLog, held_by: str | None) -> Chapter:
    record = runs.read(item.manifest.run) if item.manifest.run else None
    lineage = item.manifest.lineage
    alarm = lineage.debt >= DEBT_LIMIT or lineage.runs_since_training >= RUNS_LIMIT
    return Chapter(item, len(record.members) if record else None, _kept(store, line, item), held_by, alarm)


def _kept(store: FileStore, line: str, item: Version) -> Kept:
    files = item.manifest.files
    digests = [files[name].sha256 for name in weight_files(files)]
    if all(blob_size(store, digest) is not None for digest in digests):
        return "whole"
    if read_disposal(store, line, item.digest) is not None:
        return "purged"
    return "sparse" if all(stored_size(store, digest) is not None for digest in digests) else "missing"
