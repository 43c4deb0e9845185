"""The history of a model line: what each version erased, how its weights are stored, and who holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from salun_core.registry.holds import holds, read_disposal
from salun_core.registry.lookup import Version, ancestry
from salun_core.registry.manifest import weight_files
from salun_core.storage import FileStore
from salun_core.storage.blobs import blob_size, stored_size

Kept = Literal["whole", "sparse", "purged", "missing"]


@dataclass(frozen=True)
class VersionSummary:
    """One version of a line.

    Args:
        version: its digest and manifest.
        requests: how many deletion requests its run erased; None if no recorded run made it.
        kept: how its weights are stored.
        held_by: who keeps it from being purged, and why; None if nobody does.
        alarm: whether a full training is recommended.
    """

    version: Version
    requests: int | None
    kept: Kept
    held_by: str | None
    alarm: bool


def history(store: FileStore, line: str, requests_of: Callable[[str], int | None]) -> Sequence[VersionSummary]:
    """Summarise the versions of a line, the newest first.

    Args:
        store: where the line is stored.
        line: the model line.
        requests_of: returns how many requests a run erased, or None if the run is not recorded.

    Raises:
        UsageError: the line does not exist.
        IntegrityError: a manifest on the way is damaged or missing.
    """
    held = {hold.version: f"{hold.by}: {hold.reason}" for hold in holds(store, line)}
    return [
        VersionSummary(
            item,
            requests_of(item.manifest.run) if item.manifest.run else None,
            _kept(store, line, item),
            held.get(item.digest),
            item.manifest.lineage.retraining_recommended,
        )
        for item in ancestry(store, line)
    ]


def _kept(store: FileStore, line: str, item: Version) -> Kept:
    files = item.manifest.files
    digests = [files[name].sha256 for name in weight_files(files)]
    if all(blob_size(store, digest) is not None for digest in digests):
        return "whole"
    if read_disposal(store, line, item.digest) is not None:
        return "purged"
    return "sparse" if all(stored_size(store, digest) is not None for digest in digests) else "missing"
