"""Tells the story of a model line: what each version erased, how its files are kept, and who holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from salun_core.registry.holds import holds, read_disposal
from salun_core.registry.lookup import Version, history
from salun_core.registry.manifest import weight_files
from salun_core.storage import FileStore
from salun_core.storage.blobs import blob_size, stored_size

Kept = Literal["whole", "sparse", "purged", "missing"]


@dataclass(frozen=True)
class Chapter:
    """One version of a line.

    Args:
        version: its digest and manifest.
        requests: how many deletion requests its run erased; None if no run of the ledger made it.
        kept: how its weights lie in the store.
        held_by: who keeps it from being purged, and why; None where nobody does.
        alarm: whether so much was forgotten since the last full training that a new one is due.
    """

    version: Version
    requests: int | None
    kept: Kept
    held_by: str | None
    alarm: bool


def tell(store: FileStore, line: str, requests_of: Callable[[str], int | None]) -> Sequence[Chapter]:
    """Return the versions of a line, the newest first.

    Args:
        store: the store that holds the line.
        line: the model line.
        requests_of: returns how many deletion requests a run erased, or None if the ledger has no such run.

    Raises:
        UsageError: there is no such line.
        IntegrityError: a manifest on the way is damaged or missing.
    """
    held = {hold.version: f"{hold.by}: {hold.reason}" for hold in holds(store, line)}
    return [
        Chapter(
            version=item,
            requests=requests_of(item.manifest.run) if item.manifest.run else None,
            kept=_kept(store, line, item),
            held_by=held.get(item.digest),
            alarm=item.manifest.lineage.retraining_recommended,
        )
        for item in history(store, line)
    ]


def _kept(store: FileStore, line: str, item: Version) -> Kept:
    files = item.manifest.files
    digests = [files[name].sha256 for name in weight_files(files)]
    if all(blob_size(store, digest) is not None for digest in digests):
        return "whole"
    if read_disposal(store, line, item.digest) is not None:
        return "purged"
    return "sparse" if all(stored_size(store, digest) is not None for digest in digests) else "missing"
